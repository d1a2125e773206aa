"""Draw pictures of generated scenes, for patch features: a shape of its own for each kind of thing,
in the thing's colour, on the ground of the place.
"""

import colorsys
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from megatron_interbert.data.store import RegionStore
from megatron_interbert.files import write_text
from megatron_interbert.progress import progress
from megatron_interbert.sample.corpus import COLOUR_NAMES, HEIGHT, PLACE_NAMES, WIDTH
from megatron_interbert.sample.tasks.scenes import TaskScene

SCALE = 0.5  # pixels of a picture for each of the scene
CORNERS = 10  # of a shape
INNERMOST = 0.35  # share of the box's half that a corner is away from its middle, at least
PAINT = dict(
    zip(
        COLOUR_NAMES,
        ("#d23b35", "#2f6fd0", "#2f9e57", "#e7c02b", "#26292e", "#f4f4f2"),
        strict=True,
    )
)


def shape_of(kind: int) -> np.ndarray:
    """Return the outline of a kind of thing in the unit square [CORNERS, 2], always the same."""
    distance = np.random.default_rng([kind, 28]).uniform(INNERMOST, 1, size=CORNERS)
    angle = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    return 0.5 + 0.5 * distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def ground_of(place: int) -> tuple[int, int, int]:
    """Return the colour of the ground of a place: pale, so that things stand out."""
    shades = colorsys.hsv_to_rgb(place / len(PLACE_NAMES), 0.25, 0.8)
    return tuple(round(255 * shade) for shade in shades)


def picture_of(scene: TaskScene) -> Image.Image:
    """Draw a scene."""
    size = (round(WIDTH * SCALE), round(HEIGHT * SCALE))
    picture = Image.new("RGB", size, ground_of(scene.place))
    draw = ImageDraw.Draw(picture)

    for kind, colour, box in zip(scene.kinds, scene.colours, scene.boxes, strict=True):
        corners = box[:2] + shape_of(int(kind)) * (box[2:] - box[:2])
        outline = [tuple(corner) for corner in (corners * SCALE).tolist()]
        draw.polygon(outline, fill=PAINT[COLOUR_NAMES[colour]], outline="#555b66", width=2)

    return picture


def write_pictures(folder: Path, scenes: Mapping[int, TaskScene]) -> None:
    """Write IMAGE.png for each scene."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"pictures in {folder.name}"
    for image, scene in progress(scenes.items(), desc=title, unit="picture"):
        picture_of(scene).save(folder / f"{image}.png")


def write_captions(store: RegionStore, path: Path) -> None:
    """Write the captions of a store as JSON lines, for stores of the same scenes' pictures."""
    lines = [
        json.dumps({"image": store.image_id(int(image)), "caption": store.caption(number)}) + "\n"
        for number, image in enumerate(store.caption_image)
    ]
    write_text(path, "".join(lines))
