"""Draw images of a store as SVG: the photo, if there is one, with named boxes over it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_interbert.data.store import RegionStore
from megatron_interbert.pages.photo_folder import PhotoFolder
from megatron_interbert.pages.templates import COMMON, render

SYMBOL = Path(COMMON, "symbol.svg")
COLOURS = (
    "#2b6cb0",
    "#b7791f",
    "#2f855a",
    "#9b2c2c",
    "#6b46c1",
    "#0987a0",
    "#b83280",
    "#4a5568",
)


@dataclass
class DrawnBox:
    """Hold a box [x1, y1, x2, y2], its name, and the name's place [left, top, right, bottom]."""

    corners: np.ndarray
    name: str
    colour: str
    label: np.ndarray

    def values(self) -> dict[str, Any]:
        """Return the values for the template."""
        left, top, right, bottom = self.corners
        return {
            "x": f"{left:.0f}",
            "y": f"{top:.0f}",
            "width": f"{right - left:.0f}",
            "height": f"{bottom - top:.0f}",
            "text_x": f"{self.label[0]:.0f}",
            "text_y": f"{self.label[3]:.0f}",
            "name": self.name,
            "colour": self.colour,
        }


def draw_image(
    store: RegionStore,
    image: int,
    photos: PhotoFolder | None,
    max_boxes: int = 12,
    class_names: Sequence[str] | None = None,
    number: int | None = None,
) -> Markup:
    """Return an SVG symbol `image-NUMBER`, to be used wherever the image is shown.

    NUMBER is `number`, by default the image's own.
    """
    regions = store.read(image)
    names = (store.manifest.get("class_names") or []) if class_names is None else class_names
    width, height = regions.size
    scale = max(width, height * 4 / 3)  # frames are 4:3: the same letters in wide and tall images
    boxes = boxes_of(regions, names, scale, max_boxes)

    photo = photos.read(regions.image_id) if photos else None
    shown = None
    if photo is not None:
        shown = {"kind": photo.kind, "base64": base64.b64encode(photo.data).decode()}
    return Markup(
        render(
            SYMBOL,
            number=image if number is None else number,
            width=f"{width:g}",
            height=f"{height:g}",
            photo=shown,
            boxes=[box.values() for box in boxes],
            line=f"{scale / 220:.1f}",
            letters=f"{scale / 24:.0f}",
            halo=f"{scale / 160:.1f}",
        )
    )


def boxes_of(regions: Any, names: Sequence[str], scale: float, most: int) -> list[DrawnBox]:
    """Choose the boxes to draw, at most `most`, without repeats of an object; all boxes, without
    names, if the regions have no classes.
    """
    width, height = regions.size
    if not regions.class_probs.any():
        return [DrawnBox(box, "", COLOURS[0], np.zeros(4)) for box in regions.boxes]

    found: list[DrawnBox] = []
    for box, ids, probs in zip(regions.boxes, regions.class_ids, regions.class_probs, strict=True):
        label = int(ids[probs.argmax()])
        name = names[label].split(",")[0] if label < len(names) else str(label)
        again = any(
            name == other.name and np.abs(box - other.corners).max() < 0.12 * width
            for other in found
        )
        if again or len(found) == most:
            continue

        taken = [other.label for other in found]
        place = _label_place(box, name, width, height, scale, taken)
        found.append(DrawnBox(box, name, COLOURS[label % len(COLOURS)], place))
    return found


def _label_place(
    box: np.ndarray, name: str, width: float, height: float, scale: float, taken: list[np.ndarray]
) -> np.ndarray:
    """Return [left, top, right, bottom] for a name in the top left corner of its box.

    It is moved down below other names (`taken`), and up to stay within the image.
    """
    line = scale / 22
    room = scale / 40 * len(name)
    left = min(box[0] + scale / 90, max(width - room, 0))
    tops = np.arange(box[1], max(box[3], box[1] + 1), line)[:6]
    for top in tops:
        place = np.array([left, top, left + room, top + line])
        free = not any(
            (place[:2] < other[2:] - 1).all() and (place[2:] > other[:2] + 1).all()
            for other in taken
        )
        if free and place[3] <= height:
            return place

    top = min(box[1], height - 1.2 * line)
    return np.array([left, top, left + room, top + line])
