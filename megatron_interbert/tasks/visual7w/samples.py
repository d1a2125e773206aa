"""Read Visual7W's dataset.json: questions, and four boxes of which one is the answer."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_json
from megatron_interbert.tasks.grounding.boxes import corners
from megatron_interbert.tasks.grounding.records import RegionRecord, place_in
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.records import check_entry
from megatron_interbert.tasks.two_stores import TwoStores

CHOICES = 4
NUMBER = (int, float)
IMAGE_KEYS = {"image_id": (int, str), "split": str, "qa_pairs": list}
QA_KEYS = {"qa_id": int, "question": str, "answer": int, "multiple_choices": list}
BOX_KEYS = {"box_id": int, "x": NUMBER, "y": NUMBER, "width": NUMBER, "height": NUMBER}


def read_questions(dataset: str, split: str, stores: TwoStores, whole: bool = False) -> Records:
    """Read the questions of a part, each with the boxes to choose among; facts are the place of the
    right one.

    Raises UsageError that names the entry if a key is missing or of another kind, or if there is no
    such part. Questions are dropped and counted if they have no text, a box that the file does not
    hold, or no image in the stores; if `whole`, that raises UsageError.
    """
    if not dataset:
        raise UsageError("--dataset is missing; give dataset.json of Visual7W pointing")

    document = read_json(dataset, "--dataset")
    images = listed(document, "images", IMAGE_KEYS, dataset)
    boxes = {
        entry["box_id"]: corners([entry[key] for key in ("x", "y", "width", "height")])
        for entry in listed(document, "boxes", BOX_KEYS, dataset)
    }
    parts = sorted({image["split"] for image in images})
    if split not in parts:
        raise UsageError(f"{dataset}: has no part '{split}', expected one of {', '.join(parts)}")

    chosen = [image for image in images if image["split"] == split]
    names = found_names(chosen, stores)
    records = [
        record_of(entry, names[str(image["image_id"])], boxes, f"{dataset}: {image['image_id']}")
        for image in chosen
        for entry in image["qa_pairs"]
    ]

    return place_in(stores, f"{dataset} {split}", records, whole)


def listed(
    document: dict[str, Any], key: str, keys: dict[str, Any], path: str
) -> list[dict[str, Any]]:
    """Return a list of a document, with its entries checked."""
    entries = document.get(key)
    if not isinstance(entries, list):
        raise UsageError(f"--dataset {path}: has no list '{key}'; give Visual7W pointing's file")

    for number, entry in enumerate(entries):
        check_entry(entry, keys, f"{path}: {key} {number}")

    return entries


def found_names(images: Iterable[dict[str, Any]], stores: TwoStores) -> dict[str, str]:
    """Return the name by which the stores know each image: its file's (v7w_1.jpg), or its number,
    which is Visual Genome's.
    """
    named = {str(image["image_id"]): str(image.get("filename") or "") for image in images}
    known = stores.find([*named, *filter(None, named.values())])

    return {number: file if file in known else number for number, file in named.items()}


def record_of(
    entry: Any, image: str, boxes: dict[int, np.ndarray], where: str
) -> RegionRecord | Rejected:
    """Return a question as a record, or (id, reason) if it cannot be used."""
    check_entry(entry, QA_KEYS, f"{where}: question")
    name = str(entry["qa_id"])
    choices = [entry["answer"], *entry["multiple_choices"]]
    if not entry["question"].strip():
        return name, "the question has no text"
    if any(type(choice) is not int or choice not in boxes for choice in choices):
        return name, "the file does not hold one of its boxes"
    if len(set(choices)) < CHOICES:
        return name, "it has fewer than four boxes"

    # in the order of their ids, so that the right one has no place of its own
    order = sorted(set(choices))
    shown = np.stack([boxes[choice] for choice in order])
    right = order.index(entry["answer"])

    return RegionRecord(
        name, (entry["question"],), (image,), None, shown[right : right + 1], shown, right
    )
