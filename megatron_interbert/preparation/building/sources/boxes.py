"""Read the boxes of published features: corners in pixels or as shares of the image, alone or with
further numbers, as a field of their own or as the last columns of the features.
"""

import numpy as np

from megatron_interbert.preparation.building.sources.fields import BadRecord

PIXELS = "in pixels"
SHARES = "as shares of the image"
# Largest and smallest corner of a box as a share: detectors reach a little outside the image.
BEYOND = 1.5
BEFORE = -0.5
WITHIN = 2e-3  # rounding of half precision, in which shares are often stored
DENORMAL = 1e-30  # floats below this are integers whose bytes were taken for floats


def corners(boxes: np.ndarray) -> np.ndarray:
    """Return the four coordinates [R, 4] of boxes [R, 4 to 7], which may have width, height, area
    or a confidence behind them, or the number of the image in a batch before them.
    """
    if boxes.ndim != 2 or not 4 <= boxes.shape[1] <= 7:
        raise BadRecord("boxes are not four numbers each", f"shape {boxes.shape}")

    boxes = boxes.astype(np.float32)
    if boxes.shape[1] != 5:
        return boxes[:, :4]

    confidence = bool(((boxes[:, 4] >= 0) & (boxes[:, 4] <= 1)).all())
    batch = bool((boxes[:, 0] == boxes[0, 0]).all() and boxes[0, 0] % 1 == 0)
    if confidence and not (batch and _are_ordered(boxes[:, 1:])):
        return boxes[:, :4]
    if batch and not (confidence and _are_ordered(boxes[:, :4])):
        return boxes[:, 1:]

    raise BadRecord(
        "boxes are not four numbers each", "five, of which the first or the last may be no corner"
    )


def _are_ordered(boxes: np.ndarray) -> bool:
    """Tell whether [R, 4] can be corners x1, y1, x2, y2."""
    return bool((boxes[:, 2:] >= boxes[:, :2]).all())


def decode_boxes(data: bytes, rows: int) -> np.ndarray:
    """Return boxes [rows, 4 to 7] from their bytes, whose number tells the type."""
    width = len(data) / rows
    if width in (32.0, 40.0, 48.0, 56.0):
        code = "8"
    elif width in (16.0, 20.0, 24.0, 28.0):
        code = "4"
    else:
        raise BadRecord(
            "boxes does not fit the number of boxes", f"{len(data)} bytes for {rows} boxes"
        )

    values = np.frombuffer(data, f"<f{code}").reshape(rows, -1)
    if values.any() and np.abs(values).max() < DENORMAL:
        values = np.frombuffer(data, f"<i{code}").reshape(rows, -1)

    return values


def measure(boxes: np.ndarray, size: tuple[float, float] | None) -> str:
    """Tell whether boxes [R, 4] of an image of `size` (None: unknown) are PIXELS or SHARES; empty
    if both are possible.
    """
    if not np.isfinite(boxes).all() or not boxes.any() or (size and max(size) <= 2):
        return ""

    return SHARES if boxes.min() >= BEFORE and boxes.max() <= BEYOND else PIXELS


def split_features(features: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Split features [R, F + 6] into [R, F] and the boxes that their last columns are, as shares
    x1, y1, x2, y2, width, height (and perhaps area); boxes are None if they are not.
    """
    for columns in (7, 6):
        if features.ndim == 2 and features.shape[1] > columns:
            last = features[:, -columns:].astype(np.float32)
            if _are_boxes(last):
                return features[:, :-columns], last[:, :4]

    return features, None


def _are_boxes(columns: np.ndarray) -> bool:
    """Tell whether [R, 6 or 7] are shares x1, y1, x2, y2, width, height (, area)."""
    if not np.isfinite(columns).all() or columns.min() < BEFORE or columns.max() > BEYOND:
        return False

    extent = columns[:, 2:4] - columns[:, :2]
    same = np.abs(extent - columns[:, 4:6]).max() <= WITHIN
    if columns.shape[1] == 7:
        same = same and np.abs(extent.prod(axis=1) - columns[:, 6]).max() <= WITHIN

    return bool(same and (extent >= -WITHIN).all() and (extent.prod(axis=1) > 0).mean() > 0.5)


def size_of_image(boxes: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """Compute (w, h) from boxes [R, 4] in pixels and the same boxes as shares of the image
    [R, >= 4], using the largest corner because it is the most exact.
    """
    sizes = []

    for axis in (0, 1):
        largest = int(np.argmax(boxes[:, axis + 2]))
        share = float(shares[largest, axis + 2])
        if not 0 < share <= BEYOND:
            raise BadRecord("spatial_features are not shares of the image", str(share))
        sizes.append(float(np.round(boxes[largest, axis + 2] / share)))

    return sizes[0], sizes[1]
