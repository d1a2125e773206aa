"""Render the page of a retrieval: each query with its top images, as boxes over photos if given."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.data.store import RegionStore
from megatron_interbert.pages.drawing import draw_image
from megatron_interbert.pages.photo_folder import PhotoFolder
from megatron_interbert.pages.templates import render

TEMPLATE = Path(__file__).with_name("page.html")
COLUMNS = ("R@1", "R@5", "R@10", "median_rank")
DIRECTIONS = {"t2i": "text to image", "i2t": "image to text"}


def result_page(
    result: dict[str, Any],
    scores: np.ndarray,
    store: RegionStore,
    captions: np.ndarray,
    images: np.ndarray,
    photos: PhotoFolder | None = None,
    top: int = 5,
) -> str:
    """Return the HTML of the page.

    `scores` are [captions shown, images]; `captions` and `images` are numbers in the store.
    """
    right = np.searchsorted(images, store.caption_image[captions])
    queries = []
    shown: set[int] = set()
    for query, caption in enumerate(captions):
        order = np.argsort(-scores[query], kind="stable")
        found = []
        for column in order[:top]:
            image = int(images[column])
            shown.add(image)
            found.append(
                {
                    "number": image,
                    "id": store.image_id(image),
                    "score": f"{scores[query, column]:+.2f}",
                    "right": bool(column == right[query]),
                }
            )
        rank = 1 + int(np.flatnonzero(order == right[query])[0])
        queries.append({"text": store.caption(int(caption)), "rank": rank, "found": found})

    return render(
        TEMPLATE,
        result=result,
        queries=queries,
        images=len(images),
        columns=[column.replace("_", " ") for column in COLUMNS],
        directions=[(words, figures_of(result, short)) for short, words in DIRECTIONS.items()],
        generated=store.manifest.get("generated"),
        symbols=[draw_image(store, image, photos) for image in sorted(shown)],
    )


def figures_of(result: dict[str, Any], direction: str) -> list[str]:
    """Return the recalls and the median rank of one direction, as text for the table."""
    return [f"{result['metrics'][f'{direction}_{column}']:.1f}" for column in COLUMNS]
