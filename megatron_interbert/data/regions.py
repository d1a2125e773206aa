"""Define the regions of one image, repair their boxes, and check that a record is usable."""

from dataclasses import dataclass

import numpy as np

UNKNOWN_SIZE = (1.0, 1.0)  # of an image whose boxes are shares of it
MOST_PROBABILITY = 1.001  # or sum of probabilities, which may be rounded


@dataclass
class Regions:
    """Hold one image's regions: features [R, F] float16, boxes [R, 4] x1 y1 x2 y2 in pixels, size
    (w, h), soft labels [R, k]; if the detector gives attributes, that of each region [R, 1] and its
    probability.
    """

    image_id: str
    size: tuple[float, float]
    features: np.ndarray
    boxes: np.ndarray
    class_ids: np.ndarray
    class_probs: np.ndarray
    attribute_ids: np.ndarray | None = None
    attribute_probs: np.ndarray | None = None


def repair_boxes(boxes: np.ndarray, size: tuple[float, float]) -> tuple[np.ndarray, int]:
    """Return boxes [R, 4] with sorted corners, clipped to the image, and how many were changed."""
    fixed = np.concatenate(
        [np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1
    )
    np.clip(fixed, 0, np.array([*size, *size], dtype=fixed.dtype), out=fixed)

    return fixed, int((fixed != boxes).any(axis=1).sum())


def record_problem(regions: Regions, num_classes: int, num_attributes: int = 0) -> str | None:
    """Describe what makes a record unusable, or return None.

    Boxes outside the image do not: they can be repaired.
    """
    if has_non_finite(regions.features):
        return (
            "features hold NaN or infinity, or values beyond float16; extract it again or drop it"
        )

    if not np.isfinite(regions.boxes).all():
        return "boxes hold NaN or infinity; extract it again or drop it"
    if not (np.isfinite(regions.size).all() and min(regions.size) > 0):
        return f"image size is {regions.size}, expected width and height above 0"

    low = regions.class_ids.min()
    high = regions.class_ids.max()
    if low < 0 or high >= num_classes:
        return f"class ids {low} to {high}, expected 0 to {num_classes - 1}"
    if not (
        (regions.class_probs >= 0).all()
        and (regions.class_probs.sum(axis=1) <= MOST_PROBABILITY).all()
    ):
        return "class_probs are not probabilities (negative, NaN, or a sum above 1)"

    return _attribute_problem(regions, num_attributes) if num_attributes else None


def _attribute_problem(regions: Regions, num_attributes: int) -> str | None:
    """Describe what is wrong with the attributes of a record, or return None."""
    ids, probs = regions.attribute_ids, regions.attribute_probs
    shape = (len(regions.features), 1)
    if ids is None or probs is None or ids.shape != shape or probs.shape != shape:
        return "attributes do not fit the number of boxes"
    if not attributes_fit(ids, probs, num_attributes):
        return (
            f"attributes beyond their number; ids {ids.min()} to {ids.max()}, expected 0 to"
            f" {num_attributes - 1} with probabilities"
        )

    return None


def attributes_fit(ids: np.ndarray, probs: np.ndarray, number: int) -> bool:
    """Check whether attributes [R, 1] are below their number and have probabilities."""
    if not len(ids):
        return True
    return bool(
        ids.min() >= 0
        and ids.max() < number
        and probs.min() >= 0
        and probs.max() <= MOST_PROBABILITY
    )


def has_non_finite(features: np.ndarray) -> bool:
    """Check whether a float16 array holds NaN or infinity, by integer maxima over its bits, far
    faster than np.isfinite.

    One pass is enough for features that are never negative, such as those after a ReLU.
    """
    bits = features.reshape(-1).view(np.uint16)
    highest = np.maximum.reduce  # np.max's wrappers would cost as much again for one record
    if not bits.size or (most := highest(bits)) < 0x7C00:
        return False

    return bool(most >= 0xFC00 or highest(bits.view(np.int16)) >= 0x7C00)
