"""Render the page of a product search: queries, each with its best products."""

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_interbert.pages.drawing import draw_image
from megatron_interbert.pages.photo_folder import PhotoFolder
from megatron_interbert.pages.templates import render
from megatron_interbert.tasks.shop.catalogue import Catalogue
from megatron_interbert.tasks.shop.search import Search
from megatron_interbert.tasks.shop.search_samples import Queries

TEMPLATE = Path(__file__).with_name("page.html")


def search_page(
    result: dict[str, Any],
    queries: Queries,
    found: Search,
    catalogue: Catalogue,
    photos: PhotoFolder | None,
    most: int = 40,
    top: int = 8,
) -> str:
    """Return the HTML of a page with up to `most` queries and the first `top` products of each."""
    shown = []
    symbols: dict[int, Markup] = {}
    for number in np.unique(np.linspace(0, len(queries) - 1, min(most, len(queries))).astype(int)):
        items = []
        pairs = zip(found.found[number][:top], found.scores[number][:top], strict=True)
        for item, score in pairs:
            symbols.setdefault(int(item), picture(catalogue, int(item), photos))
            items.append(
                {
                    "number": int(item),
                    "title": catalogue.title(int(item)) or catalogue.ids[item],
                    "score": f"{score:+.2f}",
                    "right": item in queries.products[number],
                }
            )
        shown.append({"text": queries.texts[number], "found": items})

    return render(
        TEMPLATE,
        metrics=result["metrics"],
        generated=result["data"]["generated"],
        total=len(queries),
        products=len(catalogue),
        queries=shown,
        symbols=symbols.values(),
    )


def picture(catalogue: Catalogue, item: int, photos: PhotoFolder | None) -> Markup:
    """Draw the SVG symbol of an item; its id holds the item's number."""
    image = int(catalogue.images(np.array([item]))[0])
    first = catalogue.corpus.first_image
    store = int(np.searchsorted(first, image, side="right")) - 1
    local = image - int(first[store])
    return draw_image(catalogue.corpus.stores[store], local, photos, number=item)
