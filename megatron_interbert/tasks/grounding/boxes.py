"""Compare boxes in pixels.

`plain` measures a box by its corners, x2 - x1 pixels wide, as REFER and UNITER do; `inclusive`
counts both of its borders, x2 - x1 + 1, as VOLTA and 12-in-1 do.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_interbert.errors import UsageError

CONVENTIONS = ("plain", "inclusive")


def overlaps(boxes: np.ndarray, targets: np.ndarray, convention: str = "plain") -> np.ndarray:
    """Return the IoU of boxes [n, 4] with targets [m, 4], both x1 y1 x2 y2 in pixels: float64
    [n, m]; 0 where both have no area.
    """
    border = 1.0 if convention == "inclusive" else 0.0
    one = boxes.astype(np.float64)[:, None]
    other = targets.astype(np.float64)[None]
    low = np.maximum(one[..., :2], other[..., :2])
    high = np.minimum(one[..., 2:], other[..., 2:])
    shared = np.maximum(high - low + border, 0.0).prod(axis=2)
    both = areas(one, border) + areas(other, border) - shared

    return np.divide(shared, both, out=np.zeros_like(shared), where=both > 0)


def areas(boxes: np.ndarray, border: float) -> np.ndarray:
    """Return the areas of boxes [.., 4]."""
    return (boxes[..., 2:] - boxes[..., :2] + border).prod(axis=-1)


def corners(box: Sequence[float]) -> np.ndarray:
    """Return COCO's [x, y, width, height] as x1 y1 x2 y2, float32 [4]."""
    x, y, width, height = box
    return np.array([x, y, x + width, y + height], np.float32)


def corners_of(bbox: Sequence[Any], where: str) -> np.ndarray:
    """Return an entry's 'bbox' as x1 y1 x2 y2, float32 [4]; raises UsageError that says where it
    is, if it is not four numbers.
    """
    numbers = [value for value in bbox if type(value) in (int, float)]
    if len(numbers) != 4 or len(bbox) != 4:
        raise UsageError(f"{where}: 'bbox' is {json.dumps(bbox)[:60]}, expected four numbers")

    return corners(numbers)


def problem_of(boxes: np.ndarray, size: tuple[float, float]) -> str:
    """Return what is wrong with boxes [n, 4] in an image of a size (w, h), or an empty string: each
    must have an area and lie in the image, at least in part.
    """
    if not np.isfinite(boxes).all():
        return "a box is not finite"
    if (boxes[:, 2:] <= boxes[:, :2]).any():
        return "a box has no area"

    width, height = size
    if not (width > 0 and height > 0):
        return "the picture has a width or height of 0"

    outside = (boxes[:, 0] >= width) | (boxes[:, 1] >= height)
    if (outside | (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0)).any():
        return "a box lies outside the image"

    return ""
