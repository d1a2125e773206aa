"""Render the page of an evaluation: each sample's image with the right box and the chosen ones."""

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_interbert.pages.drawing import draw_image
from megatron_interbert.pages.photo_folder import PhotoFolder
from megatron_interbert.pages.templates import render
from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.grounding.prediction import Ranked
from megatron_interbert.tasks.grounding.records import RegionRecord
from megatron_interbert.tasks.grounding.samples import RIGHT
from megatron_interbert.tasks.image_finder import store_of
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.two_stores import TwoStores

TEMPLATE = Path(__file__).with_name("page.html")
SHOWN_BOXES = 3


def result_page(
    result: dict[str, Any],
    records: Records,
    ranked: list[Ranked],
    stores: TwoStores,
    most: int,
    convention: str,
    photos: PhotoFolder | None,
) -> str:
    """Return the HTML of a page with up to `most` samples, spread evenly over the files."""
    rows = np.linspace(0, len(records) - 1, min(most, len(records))).astype(int).tolist()
    corpus = stores.corpora[0]
    symbols: dict[int, Markup] = {}

    for image in (int(records.images[row][0]) for row in rows):
        if image not in symbols:
            store, number = store_of(corpus, image)
            symbols[image] = draw_image(corpus.stores[store], number, photos, number=image)

    return render(
        TEMPLATE,
        result=result,
        peers=result.get("beside", []),
        samples=[sample_of(records, row, ranked[row], convention) for row in rows],
        symbols=symbols.values(),
    )


def sample_of(records: Records, row: int, ranked: Ranked, convention: str) -> dict[str, Any]:
    """Return what the template needs of a sample."""
    record: RegionRecord = records.items[row]
    width, height = record.size
    best = overlaps(ranked.boxes[:1], record.targets, convention) if record.labelled else None

    return {
        "id": record.id,
        "texts": record.texts,
        "width": f"{width:g}",
        "height": f"{height:g}",
        "line": f"{max(width, height) / 160:.2f}",
        "image": int(records.images[row][0]),
        "right": [corners_of(box) for box in record.targets],
        "others": [corners_of(box) for box in ranked.boxes[1:SHOWN_BOXES]],
        "chosen": corners_of(ranked.boxes[0]),
        "iou": "" if best is None else f"{best.max():.2f}",
        "hit": best is not None and bool(best.max() >= RIGHT),
    }


def corners_of(box: np.ndarray) -> dict[str, str]:
    """Return a box for the template."""
    left, top, right, bottom = box
    return {
        "x": f"{left:.1f}",
        "y": f"{top:.1f}",
        "width": f"{right - left:.1f}",
        "height": f"{bottom - top:.1f}",
    }
