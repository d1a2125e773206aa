"""Detect boxes that were built in a wrong format, from their statistics after they were sorted and
clipped to the image.

Each mistake leaves a trace that right boxes never show, whatever the images:

- x y w h read as corners: x + w <= W, so after sorting no centre is right of the middle, or below
  it.
- Corners read as x y w h: the new width is the old x2 >= x1, so a box that does not touch the far
  edge is wider than its distance from the near edge, and half of all boxes touch the far edge.
- x and y swapped: no box reaches further along the long side than the short side is long, and many
  boxes touch the far edge of the short side.
"""

from typing import Any

import numpy as np

from megatron_interbert.data.regions import UNKNOWN_SIZE

LEAST_BOXES = 50
LEAST_IMAGES = 5
WHOLE = 0.9  # boxes that span more of a side than this tell nothing about it
NOT_SQUARE = 1.15  # long side / short side from which an image counts as not square
NEVER = 0.02  # shares below this count as none: rounding explains them
TO_CORNERS = "rebuild with --box-format xywh"
MENDING = {
    "normalised": (
        "rebuild from the source with interbert build-features, which multiplies shares by width"
        " and height, or write the store with boxes in pixels"
    ),
    "xywh as corners": TO_CORNERS,
    "corners as xywh": "rebuild with --box-format xyxy",
    "x and y swapped": (
        "convert the source's boxes from y1 x1 y2 x2 to x1 y1 x2 y2, or its sizes from h, w to w,"
        " h, and rebuild with --box-format xyxy"
    ),
}


class BoxFormat:
    """Accumulate sums over boxes [R, 4] of images of any size, one image at a time."""

    def __init__(self) -> None:
        self.images = self.oblong = self.reaching = self.tiny = self.of_unknown_size = 0
        self.boxes = self.no_area = self.oblong_boxes = self.crowded = 0
        # for each axis (x, y): boxes that tell something, and those of them with the centre beyond
        # the middle, at the far edge, and narrower than their distance from the near edge
        self.telling, self.beyond, self.far, self.narrow = (np.zeros(2, np.int64) for _ in range(4))

    def add(self, boxes: np.ndarray, size: tuple[float, float]) -> None:
        """Add one image's boxes as the store returns them: sorted corners inside the image."""
        # [R, 2] shares of width and height
        low = boxes[:, :2] / size
        high = boxes[:, 2:] / size
        extent = high - low
        self.images += 1
        self.boxes += len(boxes)
        self.of_unknown_size += tuple(size) == UNKNOWN_SIZE
        self.tiny += bool(0 < boxes.max() <= 1.5 and max(size) > 2)
        self.no_area += int((extent <= 0).any(axis=1).sum())
        telling = (extent < WHOLE) & (extent > 0)
        at_edge = high >= 0.99
        self.telling += telling.sum(axis=0)
        self.beyond += (telling & (low + high > 1.04)).sum(axis=0)
        self.far += (telling & at_edge).sum(axis=0)
        self.narrow += (telling & ~at_edge & (extent < 0.95 * low)).sum(axis=0)
        self._add_reach(high, size)

    def _add_reach(self, high: np.ndarray, size: tuple[float, float]) -> None:
        long = int(size[1] > size[0])
        if size[long] < NOT_SQUARE * size[1 - long]:
            return

        self.oblong += 1
        self.oblong_boxes += len(high)
        self.reaching += bool(high[:, long].max() > size[1 - long] / size[long] + 0.05)
        self.crowded += int((high[:, 1 - long] >= 0.99).sum())

    def shares(self) -> dict[str, Any]:
        """Return the figures for the decision, as shares of boxes (for x, y) or of images (for
        "reaching_far": of those that are not square).
        """
        telling = np.maximum(self.telling, 1)
        pairs = {"beyond_middle": self.beyond, "at_far_edge": self.far, "narrow": self.narrow}

        return {
            **{
                name: [round(float(v), 3) for v in values / telling]
                for name, values in pairs.items()
            },
            "reaching_far": round(self.reaching / max(self.oblong, 1), 3),
            "crowded_short_side": round(self.crowded / max(self.oblong_boxes, 1), 3),
            "no_area": round(self.no_area / max(self.boxes, 1), 3),
            "normalised": round(self.tiny / max(self.images, 1), 3),
        }

    def result(self, inverted_share: float | None = None) -> dict[str, Any]:
        """Return the mistake found ("" for none, None if unknown), a sentence about it, and the
        figures. inverted_share: share of boxes that were inverted when the store was built.
        """
        figures = {
            **self.shares(),
            "inverted": inverted_share,
            "images": self.images,
            "boxes": self.boxes,
            "of_unknown_size": self.of_unknown_size,
        }
        found = self._found(figures)

        return {"found": found, "said": _said(found, figures), **figures}

    def _found(self, f: dict[str, Any]) -> str | None:
        if f["normalised"] > 0.5:
            return "normalised"
        if (f["inverted"] or 0) > 0.3:
            return "xywh as corners"
        if self.images < LEAST_IMAGES or self.telling.min() < LEAST_BOXES:
            return None
        if max(f["beyond_middle"]) < NEVER:
            return "xywh as corners"
        if max(f["narrow"]) < NEVER and min(f["at_far_edge"]) > 0.2:
            return "corners as xywh"
        if (
            self.oblong >= LEAST_IMAGES
            and f["reaching_far"] < 0.1
            and f["crowded_short_side"] > 0.25
        ):
            return "x and y swapped"

        return ""


def _said(found: str | None, f: dict[str, Any]) -> str:
    if found is None:
        return f"not enough boxes to tell their format: {f['boxes']} in {f['images']} images"

    inverted = f"{f['inverted']:.0%} of boxes were inverted, " if f["inverted"] else ""
    middle, edge = (
        " and ".join(f"{v:.0%}" for v in f[name]) for name in ("beyond_middle", "at_far_edge")
    )

    unit = "in pixels"
    if f["of_unknown_size"]:
        unit += f" (in {f['of_unknown_size']} images shares of a size that is unknown, 1 x 1)"

    return {
        "": (
            f"boxes are corners {unit}: {middle} of centres right of and below the middle,"
            f" {edge} at the right and bottom edge"
        ),
        "normalised": (
            f"in {f['normalised']:.0%} of images all boxes are within 0..1: they are shares of the"
            " image, not pixels"
        ),
        "xywh as corners": (
            f"x y w h were read as corners: {inverted}{middle} of centres are right of and below"
            " the middle"
        ),
        "corners as xywh": (
            f"corners were read as x y w h: {edge} of boxes touch the right and bottom edge"
        ),
        "x and y swapped": (
            f"x and y, or width and height, are swapped: in {f['reaching_far']:.0%} of images that"
            " are not square boxes reach the far end of the long side, and"
            f" {f['crowded_short_side']:.0%} of boxes touch the short side's far edge"
        ),
    }[found]
