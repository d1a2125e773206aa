"""One HTML page of retrieval results: each query with its top images, drawn as boxes over the photo where there is one."""

import html

import numpy as np

from megatron_interbert.data.store import RegionStore
from megatron_interbert.pages.drawing import STYLE, draw_image
from megatron_interbert.pages.photo_folder import PhotoFolder

PAGE_STYLE = (
    STYLE + "figure.right{border-color:#1a8f4c}.query{font-size:17px;margin:.2rem 0 .6rem}.hit{color:#1a8f4c}.miss{color:#b3402e}\n"
)


def metrics_table(result: dict) -> str:
    """The recall table of both directions."""
    columns = ["R@1", "R@5", "R@10", "median_rank"]
    rows = ["<tr><th>direction</th>" + "".join(f"<th>{c.replace('_', ' ')}</th>" for c in columns) + "</tr>"]
    for short, direction in (("t2i", "text to image"), ("i2t", "image to text")):
        cells = "".join(f"<td>{result['metrics'][f'{short}_{c}']:.1f}</td>" for c in columns)
        rows.append(f"<tr><td>{direction}</td>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def result_page(
    result: dict,
    scores: np.ndarray,
    store: RegionStore,
    captions: np.ndarray,
    images: np.ndarray,
    photos: PhotoFolder | None = None,
    top: int = 5,
) -> str:
    """The page as text. scores [captions shown, images]; captions and images are numbers in the store."""
    right = np.searchsorted(images, store.caption_image[captions])
    sections, shown = [], set()
    for query in range(len(captions)):
        order = np.argsort(-scores[query], kind="stable")
        rank = 1 + int(np.flatnonzero(order == right[query])[0])
        figures = []
        for place, column in enumerate(order[:top], 1):
            image = int(images[column])
            shown.add(image)
            kind = " class=right" if column == right[query] else ""
            figures.append(
                f'<figure{kind}><svg role="img"><use href="#image-{image}"/></svg><figcaption>'
                f"<span>{place}. {html.escape(store.image_id(image))}</span><b>{scores[query, column]:+.2f}</b></figcaption></figure>"
            )
        verdict = f'<span class="{"hit" if rank == 1 else "miss"}">its image is number {rank} of {len(images)}</span>'
        sections.append(
            f'<section><p class="query">{html.escape(store.caption(int(captions[query])))}</p>'
            f'<p class="note">{verdict}</p><div class="row">{"".join(figures)}</div></section>'
        )
    origin = " Generated scenes, not photographs." if store.manifest.get("generated") else ""
    note = (
        f"{result['captions']} captions x {len(images)} images, {result['protocol']}; chance R@1 is {result['chance_R@1']:.2f} %."
        f" Score: margin of the matching head. The right image has a green frame.{origin}"
    )
    symbols = "".join(draw_image(store, image, photos) for image in sorted(shown))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>InterBERT retrieval</title><style>{PAGE_STYLE}</style><svg class="symbols">{symbols}</svg>'
        f"<h1>Image retrieval by caption</h1>{metrics_table(result)}"
        f'<p class="note">{html.escape(note)}</p>{"".join(sections)}</html>'
    )
