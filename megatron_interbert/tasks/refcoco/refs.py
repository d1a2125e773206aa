"""Read the referring expressions of REFER: references with their sentences, and COCO's boxes."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_json, read_json_value
from megatron_interbert.tasks.grounding.boxes import corners_of
from megatron_interbert.tasks.grounding.records import RegionRecord, place_in
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.plain_pickles import read_plain_pickle
from megatron_interbert.tasks.records import check_entry
from megatron_interbert.tasks.two_stores import TwoStores

REF_KEYS = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}
IMAGE_KEYS = {"id": int, "file_name": str, "width": (int, float), "height": (int, float)}
BOX_KEYS = {"id": int, "image_id": int, "bbox": list}

# x1 y1 x2 y2 by the ids of an image and of an annotation
Boxes = dict[tuple[int, int], np.ndarray]


def read_expressions(
    refs: str, instances: str, split: str, stores: TwoStores, whole: bool = False
) -> Records:
    """Read the expressions of a part of the references, each with the box that it means.

    Raises UsageError that names file and entry if a key is missing or of another kind, or if there
    is no such part. Expressions are dropped and counted if they have no text, no image in the
    stores or no box in it; if `whole`, that raises UsageError.
    """
    if not refs or not instances:
        raise UsageError(
            "--refs or --instances is missing; give refs(unc).p (RefCOCO, RefCOCO+) or refs(umd).p"
            " (RefCOCOg), and instances.json"
        )

    references = list(read_refs(refs))
    parts = sorted({entry["split"] for entry in references})
    if split not in parts:
        raise UsageError(f"{refs}: has no part '{split}', expected one of {', '.join(parts)}")

    images, boxes = read_instances(instances)
    records = [
        record
        for entry in references
        if entry["split"] == split
        for record in records_of(entry, images, boxes)
    ]

    return place_in(stores, f"{refs} {split}", records, whole)


def read_refs(path: str) -> Iterator[dict[str, Any]]:
    """Yield the references of a file, a pickle of plain values or JSON."""
    listed = (
        read_json_value(path, "--refs")
        if path.endswith(".json")
        else read_plain_pickle(path, "--refs")
    )
    if not isinstance(listed, list):
        raise UsageError(f"--refs {path}: expected a list of references; give a file of REFER")

    for number, entry in enumerate(listed):
        where = f"{path}: reference {number}"
        check_entry(entry, REF_KEYS, where)
        for place, sentence in enumerate(entry["sentences"]):
            check_entry(sentence, {"sent_id": int, "sent": str}, f"{where}, sentence {place}")
        yield entry


def read_instances(path: str) -> tuple[dict[int, dict[str, Any]], Boxes]:
    """Read the images of an instances.json by id, and the boxes of annotations."""
    document = read_json(path, "--instances", keep=smaller)
    for key, keys in (("images", IMAGE_KEYS), ("annotations", BOX_KEYS)):
        if not isinstance(document.get(key), list):
            raise UsageError(
                f"--instances {path}: has no list '{key}'; give REFER's instances.json"
            )
        for number, entry in enumerate(document[key]):
            check_entry(entry, keys, f"{path}: {key} {number}")

    images = {entry["id"]: entry for entry in document["images"]}
    boxes = {
        (entry["image_id"], entry["id"]): corners_of(entry["bbox"], f"{path}: annotations {number}")
        for number, entry in enumerate(document["annotations"])
    }

    return images, boxes


def smaller(entry: dict[str, Any]) -> dict[str, Any]:
    """Leave out the outlines of objects, which fill most of the file."""
    entry.pop("segmentation", None)
    return entry


def records_of(
    entry: dict[str, Any], images: dict[int, dict[str, Any]], boxes: Boxes
) -> Iterator[RegionRecord | Rejected]:
    """Yield the sentences of a reference as records, or (id, reason) if it cannot be used."""
    image = images.get(entry["image_id"])
    box = boxes.get((entry["image_id"], entry["ann_id"]))

    for sentence in entry["sentences"]:
        name = str(sentence["sent_id"])
        if not sentence["sent"].strip():
            yield name, "the expression has no text"
        elif image is None:
            yield name, "--instances has no such image"
        elif box is None:
            yield name, "--instances has no box for it"
        else:
            size = (float(image["width"]), float(image["height"]))
            yield RegionRecord(name, (sentence["sent"],), (image["file_name"],), size, box[None])
