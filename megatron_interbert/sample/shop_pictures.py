"""Draw the pictures of generated products: the outline of their kind in their colour and pattern,
on the background of their place.
"""

import numpy as np
from PIL import Image, ImageDraw

from megatron_interbert.sample.shop_world import COLOURS, KINDS, PATTERNS, PLACES

PIXELS = 240
PAINT = dict(
    zip(
        COLOURS,
        ("#d23b35", "#2f6fd0", "#2f9e57", "#e7c02b", "#26292e", "#f4f4f2", "#ec8fb4", "#7d4fb5"),
        strict=True,
    )
)
GROUND = dict(
    zip(PLACES, ("#f3e3b8", "#c9cdd3", "#bfe0b1", "#e9f1f8", "#e9dccb", "#4a3f5c"), strict=True)
)
# Outlines in the unit square; several kinds share one.
DRESS = [(0.35, 0), (0.65, 0), (0.62, 0.35), (0.9, 1), (0.1, 1), (0.38, 0.35)]
SKIRT = [(0.3, 0.1), (0.7, 0.1), (0.95, 0.95), (0.05, 0.95)]
TOP = [
    (0.3, 0.1),
    (0.7, 0.1),
    (1, 0.35),
    (0.85, 0.5),
    (0.75, 0.4),
    (0.75, 1),
    (0.25, 1),
    (0.25, 0.4),
    (0.15, 0.5),
    (0, 0.35),
]
COAT = [
    (0.3, 0),
    (0.7, 0),
    (0.95, 0.6),
    (0.82, 0.66),
    (0.74, 0.35),
    (0.8, 1),
    (0.2, 1),
    (0.26, 0.35),
    (0.18, 0.66),
    (0.05, 0.6),
]
TROUSERS = [(0.25, 0), (0.75, 0), (0.85, 1), (0.6, 1), (0.5, 0.35), (0.4, 1), (0.15, 1)]
SHORTS = [(0.2, 0.2), (0.8, 0.2), (0.95, 0.8), (0.55, 0.8), (0.5, 0.5), (0.45, 0.8), (0.05, 0.8)]
SHOE = [(0.05, 0.35), (0.35, 0.35), (0.6, 0.6), (0.95, 0.7), (0.95, 0.88), (0.05, 0.88)]
HEEL = [
    (0.05, 0.2),
    (0.3, 0.3),
    (0.65, 0.7),
    (0.98, 0.78),
    (0.98, 0.88),
    (0.55, 0.86),
    (0.18, 0.5),
    (0.14, 0.88),
    (0.07, 0.88),
]
BOOT = [(0.2, 0), (0.55, 0), (0.55, 0.6), (0.95, 0.75), (0.95, 0.95), (0.2, 0.95)]
BAG = [
    (0.1, 0.4),
    (0.3, 0.4),
    (0.35, 0.1),
    (0.65, 0.1),
    (0.7, 0.4),
    (0.9, 0.4),
    (0.95, 1),
    (0.05, 1),
]
HAT = [
    (0, 0.7),
    (0.25, 0.6),
    (0.3, 0.25),
    (0.7, 0.25),
    (0.75, 0.6),
    (1, 0.7),
    (0.85, 0.8),
    (0.15, 0.8),
]
SCARF = [
    (0.1, 0.1),
    (0.9, 0.1),
    (0.9, 0.3),
    (0.6, 0.35),
    (0.65, 1),
    (0.4, 1),
    (0.4, 0.35),
    (0.1, 0.3),
]
GLOVE = [
    (0.3, 1),
    (0.3, 0.6),
    (0.1, 0.4),
    (0.2, 0.3),
    (0.35, 0.45),
    (0.35, 0.05),
    (0.75, 0.05),
    (0.75, 1),
]
GLASSES = [(0, 0.35), (1, 0.35), (0.95, 0.65), (0.6, 0.65), (0.5, 0.45), (0.4, 0.65), (0.05, 0.65)]
BELT = [(0, 0.42), (1, 0.42), (1, 0.58), (0, 0.58)]
SHAPES = dict(
    zip(
        KINDS,
        (
            DRESS,
            SKIRT,
            TOP,
            TOP,
            TOP,
            COAT,
            COAT,
            TROUSERS,
            SHORTS,
            COAT,
            SHORTS,
            TOP,
            HEEL,
            SHOE,
            SHOE,
            BOOT,
            SHOE,
            BAG,
            BAG,
            HAT,
            SCARF,
            GLOVE,
            GLASSES,
            BELT,
        ),
        strict=True,
    )
)


def draw_product(things: list[tuple[int, int, int]], place: int, boxes: np.ndarray) -> Image.Image:
    """Draw a picture of things (kind, colour, pattern) in their boxes [n, 4] x1 y1 x2 y2, which are
    shares of the picture.
    """
    picture = Image.new("RGB", (PIXELS, PIXELS), GROUND[PLACES[place]])

    # the first thing is drawn last, in front of the others
    for (kind, colour, pattern), box in list(zip(things, boxes, strict=True))[::-1]:
        left, top, right, bottom = (float(x) * PIXELS for x in box)
        outline = [
            (left + x * (right - left), top + y * (bottom - top)) for x, y in SHAPES[KINDS[kind]]
        ]
        shape = Image.new("L", picture.size, 0)
        ImageDraw.Draw(shape).polygon(outline, fill=255)
        picture.paste(cloth(COLOURS[colour], PATTERNS[pattern]), (0, 0), shape)
        ImageDraw.Draw(picture).polygon(outline, outline="#555b66", width=2)

    return picture


def cloth(colour: str, pattern: str) -> Image.Image:
    """Draw a sheet of cloth of the size of a picture, in a colour and a pattern."""
    paint = PAINT[colour]
    other = "#ffffff" if colour != "白色" else "#9aa0a8"
    sheet = Image.new("RGB", (PIXELS, PIXELS), paint)
    draw = ImageDraw.Draw(sheet)
    step = 16

    for at in range(0, PIXELS, step):
        if pattern in ("条纹", "格子"):
            draw.line([(at, 0), (at, PIXELS)], fill=other, width=4)
        if pattern == "格子":
            draw.line([(0, at), (PIXELS, at)], fill=other, width=4)
        for across in range(0, PIXELS, step):
            if pattern == "波点":
                draw.ellipse([at + 4, across + 4, at + 10, across + 10], fill=other)
            if pattern == "碎花" and (at + across) // step % 2:
                draw.ellipse([at + 2, across + 6, at + 14, across + 10], fill=other)
                draw.ellipse([at + 6, across + 2, at + 10, across + 14], fill=other)
                draw.ellipse([at + 6, across + 6, at + 10, across + 10], fill="#e7a52b")

    return sheet
