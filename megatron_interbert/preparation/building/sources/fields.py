"""Convert the fields of a published record to regions, for every format: box formats, class
numbering, soft labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_interbert.data.regions import MOST_PROBABILITY, Regions

DENSE = "dense"
TOP_1 = "top_1_confidence"
CLASS_ONLY = "top_1_without_confidence"
NONE = "none"
BACKGROUND_FIRST = "background-first"
BACKGROUND_NONE = "background-none"


@dataclass(frozen=True)
class ReadOptions:
    """Hold how to interpret records.

    class_ids: whether id 0 is background (background-first) or the first object (background-none);
    empty: as usual for the format. image_sizes: file with the sizes of images whose records have
    none. class_names: background first, for records that name their classes; empty: unknown.
    """

    class_ids: str = ""
    box_format: str = "xyxy"
    soft_labels: int = 10
    num_classes: int = 1601  # with background
    num_attributes: int = 400
    trust_pickle: bool = False
    image_sizes: str = ""
    class_names: tuple[str, ...] = ()


class BadRecord(ValueError):
    """Report a record without a usable image: a short reason without numbers, and details."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason, details)
        self.reason = reason
        self.details = details


def number(fields: Mapping[str, Any], name: str) -> float:
    """Return a numeric field as float; raise BadRecord if it is not a finite number."""
    try:
        value = float(np.asarray(fields[name]).reshape(()))
    except (KeyError, TypeError, ValueError) as error:
        raise BadRecord(f"{name} is not a number", str(fields.get(name))[:60]) from error

    if not np.isfinite(value):
        raise BadRecord(f"{name} is not a number", str(value))

    return value


def make_regions(
    fields: Mapping[str, Any],
    options: ReadOptions,
    scheme: str = BACKGROUND_NONE,
    shares: bool = False,
) -> tuple[Regions, str]:
    """Build regions, and the kind of their labels, from image_id, width, height, boxes [R, 4],
    features [R, F] and one of: class_probs [R, C], class_ids [R] with class_confidence [R],
    class_ids alone, nothing; and perhaps attribute_ids [R] with attribute_confidence [R].

    `scheme` is the usual class numbering of the format. shares: boxes are shares of the image.
    Raises BadRecord if fields do not fit.
    """
    features = np.asarray(fields["features"])
    boxes = np.asarray(fields["boxes"], dtype=np.float32)
    rows = len(features)
    if rows == 0:
        raise BadRecord("no regions")
    if features.ndim != 2 or boxes.shape != (rows, 4):
        raise BadRecord(
            "boxes and features do not match", f"boxes {boxes.shape}, features {features.shape}"
        )

    if features.dtype.kind not in "fiu":
        raise BadRecord("features are not numbers", str(features.dtype))

    boxes = _corners(boxes, options.box_format)
    size = (number(fields, "width"), number(fields, "height"))
    if shares:
        boxes = boxes * np.array([*size, *size], np.float32)

    ids, probs, kind = _labels(fields, rows, options, options.class_ids or scheme)
    name = (
        fields["image_id"].item()
        if isinstance(fields["image_id"], np.generic | np.ndarray)
        else fields["image_id"]
    )

    return (
        Regions(
            name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name),
            size,
            features,
            boxes,
            ids,
            probs,
            *_attributes(fields, rows, options),
        ),
        kind,
    )


def _corners(boxes: np.ndarray, order: str) -> np.ndarray:
    """Return boxes [R, 4] as x1, y1, x2, y2."""
    if order == "yxyx":
        return boxes[:, [1, 0, 3, 2]]
    if order == "xywh":
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)

    return boxes


def _labels(
    fields: Mapping[str, Any], rows: int, options: ReadOptions, scheme: str
) -> tuple[np.ndarray, np.ndarray, str]:
    if "class_probs" in fields:
        dense = _distribution(np.asarray(fields["class_probs"], np.float32), rows, options)
        return *_most_likely(dense, _decided(fields, rows, scheme, options), options), DENSE

    width = min(options.soft_labels, options.num_classes)
    probs = np.zeros((rows, width), np.float32)
    if "class_ids" not in fields:
        return np.tile(np.arange(width, dtype=np.int64), (rows, 1)), probs, NONE

    first = np.asarray(fields["class_ids"]).reshape(-1)
    if first.shape != (rows,) or first.dtype.kind not in "iu":
        raise BadRecord(
            "class ids do not fit the number of boxes",
            f"{first.shape} {first.dtype} for {rows} boxes",
        )

    first = first.astype(np.int64) + (scheme == BACKGROUND_NONE)
    if first.min() < 0 or first.max() >= options.num_classes:
        raise BadRecord(
            "class ids beyond the classes",
            f"{first.min()} to {first.max()}, expected 0 to {options.num_classes - 1}",
        )

    confidence = fields.get("class_confidence")
    if confidence is not None:
        confidence = np.asarray(confidence, np.float32).reshape(-1)
        if confidence.shape != (rows,):
            raise BadRecord(
                "class confidences do not fit the number of boxes",
                f"{confidence.shape} for {rows} boxes",
            )

    probs[:, 0] = 1.0 if confidence is None else confidence
    # Only one class is known; the other entries are other classes with probability 0.
    ids = (first[:, None] + np.arange(width)) % options.num_classes

    return ids, probs, CLASS_ONLY if confidence is None else TOP_1


def _attributes(
    fields: Mapping[str, Any], rows: int, options: ReadOptions
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the attribute of each region and its confidence [R, 1], from attribute_ids [R] and
    perhaps attribute_confidence [R]; (None, None) if there are none.
    """
    if "attribute_ids" not in fields:
        return None, None

    ids = np.asarray(fields["attribute_ids"]).reshape(-1)
    confidence = fields.get("attribute_confidence")
    probs = np.ones(rows) if confidence is None else np.asarray(confidence).reshape(-1)
    if ids.shape != (rows,) or probs.shape != (rows,) or ids.dtype.kind not in "iu":
        raise BadRecord(
            "attributes do not fit the number of boxes",
            f"{ids.shape} {ids.dtype} with confidences {probs.shape} for {rows} boxes",
        )
    if ids.min() < 0 or ids.max() >= options.num_attributes:
        raise BadRecord(
            "attribute ids beyond the attributes",
            f"{ids.min()} to {ids.max()}, expected 0 to {options.num_attributes - 1}; see"
            " --num-attributes",
        )

    if not (probs.min() >= 0 and probs.max() <= MOST_PROBABILITY):
        raise BadRecord(
            "attribute confidences are no probabilities", f"{probs.min():g} to {probs.max():g}"
        )

    return ids.astype(np.int32)[:, None], probs.astype(np.float32)[:, None]


def _distribution(dense: np.ndarray, rows: int, options: ReadOptions) -> np.ndarray:
    """Return a distribution over all classes [R, C]; one with a column fewer leaves background
    out.
    """
    if dense.shape == (rows, options.num_classes - 1):
        dense = np.concatenate([np.zeros((rows, 1), np.float32), dense], axis=1)
    if dense.shape != (rows, options.num_classes):
        raise BadRecord(
            "class distribution of a wrong shape",
            f"{dense.shape}, expected {(rows, options.num_classes)} or one column fewer, without"
            " background; see --num-classes",
        )

    return dense


def _decided(
    fields: Mapping[str, Any], rows: int, scheme: str, options: ReadOptions
) -> np.ndarray | None:
    """Return the classes [R] that the detector decided on, if they come with confidences of their
    own beside the distribution; None if they do not, or do not fit.
    """
    if "class_ids" not in fields or "class_confidence" not in fields:
        return None

    ids = np.asarray(fields["class_ids"]).reshape(-1)
    if ids.shape != (rows,) or ids.dtype.kind not in "iu":
        return None

    ids = ids.astype(np.int64) + (scheme == BACKGROUND_NONE)

    return ids if ids.min() >= 0 and ids.max() < options.num_classes else None


def _most_likely(
    dense: np.ndarray, first: np.ndarray | None, options: ReadOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and probabilities of the most likely classes, each [R, k], highest first, but
    `first` [R] before all others: the best object where background is more likely.
    """
    ranks = -dense
    if first is not None:
        ranks[np.arange(len(dense)), first] = -np.inf

    ids = np.argsort(ranks, axis=1, kind="stable")[:, : options.soft_labels]

    return ids, np.take_along_axis(dense, ids, axis=1)
