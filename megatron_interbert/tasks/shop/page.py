"""The result of a product search as one HTML file without outside resources: queries, each with its best products."""

import html
from typing import Any

import numpy as np

from megatron_interbert.pages.drawing import STYLE, draw_image
from megatron_interbert.pages.photo_folder import PhotoFolder
from megatron_interbert.tasks.shop.catalogue import Catalogue
from megatron_interbert.tasks.shop.search import Search
from megatron_interbert.tasks.shop.search_samples import Queries

PAGE_STYLE = (
    STYLE
    + "figure.right{border-color:#1a8f4c}.query{font-size:17px;margin:.2rem 0}h1{font-size:22px}figcaption b{font-weight:600}\n"
)


def search_page(
    result: dict[str, Any], queries: Queries, found: Search, catalogue: Catalogue, photos: PhotoFolder | None, most: int = 40, top: int = 8
) -> str:
    """Up to `most` queries, with the first `top` products of each; those that a query is for have a green frame."""
    ids, sections, symbols = catalogue.ids, [], {}
    for number in np.unique(np.linspace(0, len(queries) - 1, min(most, len(queries))).astype(int)):
        figures = []
        for place, (item, score) in enumerate(zip(found.found[number][:top], found.scores[number][:top], strict=True), 1):
            symbols.setdefault(int(item), picture(catalogue, int(item), photos))
            right = " class=right" if item in queries.products[number] else ""
            title = html.escape(catalogue.title(int(item)) or ids[item])
            figures.append(
                f'<figure{right}><svg role="img" aria-label="{title}"><use href="#image-{item}"/></svg>'
                f"<figcaption><span>{place}. {title}</span><b>{score:+.2f}</b></figcaption></figure>"
            )
        sections.append(
            f'<section><p class="query">{html.escape(queries.texts[number])}</p><div class="row">{"".join(figures)}</div></section>'
        )
    cells = "".join(f"<td>{value:.1f}</td>" for value in result["metrics"].values())
    names = "".join(f"<th>{html.escape(name)}</th>" for name in result["metrics"])
    table = f"<table><tr>{names}</tr><tr>{cells}</tr></table>" if cells else ""
    origin = " Generated products, not photographs." if result["data"]["generated"] else ""
    note = (
        f"{len(queries)} queries x {len(catalogue)} products. Score: margin of the matching head. Products that a query is for have a"
        f" green frame.{origin}"
    )
    return (
        '<!doctype html><html lang="zh"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>InterBERT product search</title><style>{PAGE_STYLE}</style><svg class="symbols">{"".join(symbols.values())}</svg>'
        f'<h1>Product search</h1>{table}<p class="note">{note}</p>{"".join(sections)}</html>'
    )


def picture(catalogue: Catalogue, item: int, photos: PhotoFolder | None) -> str:
    """An SVG symbol of an item."""
    image = int(catalogue.images(np.array([item]))[0])
    store = int(np.searchsorted(catalogue.corpus.first_image, image, side="right")) - 1
    local = image - int(catalogue.corpus.first_image[store])
    symbol = draw_image(catalogue.corpus.stores[store], local, photos)
    return symbol.replace(f'id="image-{local}"', f'id="image-{item}"', 1)
