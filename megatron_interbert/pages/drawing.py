"""Images of a store as SVG for result pages: the photo where there is one, confident boxes and their class names over it."""

import base64
import html
from collections.abc import Sequence

import numpy as np

from megatron_interbert.data.store import RegionStore
from megatron_interbert.pages.photo_folder import PhotoFolder

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#1c2430;background:#fbfbfc}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .9rem;border-bottom:1px solid #dde1e7;text-align:right}
th:first-child,td:first-child{text-align:left}section{margin:1.6rem 0;border-top:1px solid #dde1e7;padding-top:1rem}
.row{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:.8rem}figure{margin:0;border:2px solid #dde1e7;
border-radius:6px;overflow:hidden;background:#fff}figcaption{padding:.25rem .5rem;font-size:13px;
display:flex;justify-content:space-between;gap:.5rem}figcaption span{overflow-wrap:anywhere}
svg{display:block;width:100%;aspect-ratio:4/3;background:#eef1f5}.symbols{position:absolute;width:0;height:0}.note{color:#5c6675}
"""
COLOURS = ("#2b6cb0", "#b7791f", "#2f855a", "#9b2c2c", "#6b46c1", "#0987a0", "#b83280", "#4a5568")


def draw_image(
    store: RegionStore, image: int, photos: PhotoFolder | None, max_boxes: int = 12, class_names: Sequence[str] | None = None
) -> str:
    """An SVG symbol, to be used wherever the image is shown: photo if there is one, confident boxes with class names."""
    regions = store.read(image)
    names = (store.manifest.get("class_names") or []) if class_names is None else class_names
    width, height = regions.size
    parts = [f'<symbol id="image-{image}" viewBox="0 0 {width:g} {height:g}">']
    photo = photos.read(regions.image_id) if photos else None
    if photo is not None:
        data = base64.b64encode(photo.data).decode()
        parts.append(f'<image href="data:image/{photo.kind};base64,{data}" width="{width:g}" height="{height:g}"/>')
    scale = max(width, height * 4 / 3)  # frames are 4:3: the same letters in wide and tall images
    seen: list[tuple[str, np.ndarray]] = []
    taken: list[np.ndarray] = []
    labels: list[str] = []  # above all boxes
    for box, ids, probs in zip(regions.boxes, regions.class_ids, regions.class_probs, strict=True):
        label = int(ids[probs.argmax()])
        name = names[label].split(",")[0] if label < len(names) else str(label)
        if len(seen) == max_boxes or any(name == other and np.abs(box - place).max() < 0.12 * width for other, place in seen):
            continue  # the same object again
        seen.append((name, box))
        taken.append(_label_place(box, name, width, height, scale, taken))
        rectangle, text = draw_box(box, name, COLOURS[label % len(COLOURS)], scale, taken[-1])
        parts.append(rectangle)
        labels.append(text)
    return "".join([*parts, *labels, "</symbol>"])


def _label_place(box: np.ndarray, name: str, width: float, height: float, scale: float, taken: list[np.ndarray]) -> np.ndarray:
    """Left, top, right, bottom of a name inside its box's corner: within the image, and below names that are there already."""
    line, room = scale / 22, scale / 40 * len(name)
    left = min(box[0] + scale / 90, max(width - room, 0))
    tops = np.arange(box[1], max(box[3], box[1] + 1), line)[:6]
    for top in tops:
        place = np.array([left, top, left + room, top + line])
        free = not any((place[:2] < other[2:] - 1).all() and (place[2:] > other[:2] + 1).all() for other in taken)
        if free and place[3] <= height:
            return place
    top = min(box[1], height - 1.2 * line)
    return np.array([left, top, left + room, top + line])


def draw_box(box: np.ndarray, name: str, colour: str, scale: float, label: np.ndarray) -> tuple[str, str]:
    """SVG of one box [4], and of its name at `label` [4]; lines and letters are fractions of `scale`."""
    x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{h:.0f}" fill="{colour}" fill-opacity=".1"'
        f' stroke="{colour}" stroke-width="{scale / 220:.1f}"/>',
        f'<text x="{label[0]:.0f}" y="{label[3]:.0f}" font-size="{scale / 24:.0f}" fill="{colour}"'
        f' stroke="#fff" stroke-width="{scale / 160:.1f}" paint-order="stroke">{html.escape(name)}</text>',
    )
