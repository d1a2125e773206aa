"""Render the page of an evaluation: each sample's image with the right box and the chosen ones."""

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_interbert.pages.drawing import draw_image
from megatron_interbert.pages.photo_folder import PhotoFolder
from megatron_interbert.pages.templates import render
from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.grounding.config import EvaluateRegionsConfig
from megatron_interbert.tasks.grounding.job import Pointing
from megatron_interbert.tasks.grounding.prediction import Ranked
from megatron_interbert.tasks.grounding.records import RegionRecord
from megatron_interbert.tasks.image_finder import store_of
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.two_stores import TwoStores

TEMPLATE = Path(__file__).with_name("page.html")
SHOWN_BOXES = 3  # best regions of a sample
AMONG = {"_gt": "annotated", "_det": "detected"}


def result_page(
    result: dict[str, Any],
    task: Pointing,
    records: Records,
    way: str,
    ranked: list[Ranked],
    stores: TwoStores,
    config: EvaluateRegionsConfig,
    photos: PhotoFolder | None,
) -> str:
    """Return the HTML of a page with up to --examples samples, spread evenly over the files, with
    the regions that are best in a way of choosing them, a key of `Pointing.ways`.
    """
    count = min(config.examples, len(records))
    rows = np.linspace(0, len(records) - 1, count).astype(int).tolist()
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
        among=AMONG.get(way, ""),
        samples=[sample_of(task, records, row, ranked[row], config.iou) for row in rows],
        symbols=symbols.values(),
    )


def sample_of(
    task: Pointing, records: Records, row: int, ranked: Ranked, convention: str
) -> dict[str, Any]:
    """Return what the template needs of a sample."""
    record: RegionRecord = records.items[row]
    width, height = record.size
    chosen = ranked.boxes[:1]
    iou = hit = None
    if record.labelled:
        iou = overlaps(chosen, record.targets, convention).max()
        hit = bool(task.is_right(record, chosen, convention)[0])

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
        "iou": "" if iou is None else f"{iou:.2f}",
        "hit": hit,
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
