"""Lay pictures out as inputs of a fixed size, and say which part of a picture each cell shows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

RESIZES = ("whole", "pad", "crop")
LEAST_SIDE = 1e-6  # of a cell that shows something, as a share of the picture


@dataclass(frozen=True)
class Extent:
    """Hold which part of a picture an input shows: the corners x1 y1 x2 y2 of the whole input as
    shares of the picture; beyond 0 to 1 there is padding.
    """

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    def cells(self, rows: int, columns: int) -> np.ndarray:
        """Return the boxes of the input's cells, row by row, as shares of the picture: float64
        [rows * columns, 4].
        """
        x = np.linspace(self.left, self.right, columns + 1)
        y = np.linspace(self.top, self.bottom, rows + 1)
        low = np.stack(np.meshgrid(x[:-1], y[:-1]), axis=2).reshape(-1, 2)
        high = np.stack(np.meshgrid(x[1:], y[1:]), axis=2).reshape(-1, 2)

        return np.concatenate([low, high], axis=1)

    def inputs(self, boxes: np.ndarray) -> np.ndarray:
        """Return boxes [n, 4] in shares of the picture as shares of the input."""
        start = np.array([self.left, self.top, self.left, self.top])
        size = np.array([self.right - self.left, self.bottom - self.top] * 2)
        return (boxes - start) / size


def padded(image: "Image", size: tuple[int, int], how: int) -> tuple["Image", Extent]:
    """Return a picture scaled to fit into `size` (width, height) with its shape kept, in the upper
    left corner of a black one, and what that shows.
    """
    from PIL.Image import new

    scale = min(size[0] / image.width, size[1] / image.height)
    inner = tuple(
        min(max(round(side * scale), 1), most) for side, most in zip(image.size, size, strict=True)
    )
    whole = new("RGB", size)
    whole.paste(image.resize(inner, how))

    return whole, Extent(right=size[0] / inner[0], bottom=size[1] / inner[1])


def cropped(image: "Image", size: tuple[int, int], how: int) -> tuple["Image", Extent]:
    """Return the middle of a picture, scaled so that it just covers `size` (width, height), and
    what that shows.
    """
    scale = max(size[0] / image.width, size[1] / image.height)
    outer = [max(round(side * scale), least) for side, least in zip(image.size, size, strict=True)]
    left, top = ((whole - part) // 2 for whole, part in zip(outer, size, strict=True))
    part = image.resize(tuple(outer), how).crop((left, top, left + size[0], top + size[1]))

    return part, Extent(
        left / outer[0], top / outer[1], (left + size[0]) / outer[0], (top + size[1]) / outer[1]
    )


def visible_cells(extent: Extent, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which cells of an input show a part of the picture, by number [n], and their boxes as
    shares of it, clipped to it: float64 [n, 4].
    """
    boxes = np.clip(extent.cells(rows, columns), 0.0, 1.0)
    sides = boxes[:, 2:] - boxes[:, :2]
    shown = np.flatnonzero((sides > LEAST_SIDE).all(axis=1))

    return shown, boxes[shown]
