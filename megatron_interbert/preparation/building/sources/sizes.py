"""Read the sizes of images from a file beside the features: hw.tsv of Oscar and VinVL, or JSON."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.sources.fields import BadRecord, number
from megatron_interbert.preparation.building.sources.names import renamed
from megatron_interbert.reading import read_text

NUMBERS = ("id", "image_id", "cocoid", "imgid")
Size = tuple[float, float]


def read_sizes(path: str) -> dict[str, Size]:
    """Return (width, height) by image id.

    The file has lines `id, tab, {"height": h, "width": w}` (or a list of it, or `h w`), or is JSON:
    id -> {"width", "height"}, or a list of images (that of COCO or Visual Genome), which go by file
    name, and by numbers that no file has.
    Raises UsageError for anything else.
    """
    text = read_text(path, "--image-sizes")
    try:
        is_json = text.lstrip()[:1] in ("{", "[")
        found = dict(_of_json(json.loads(text)) if is_json else _of_lines(text))
    except (ValueError, TypeError, RecursionError, AttributeError, BadRecord) as error:
        raise UsageError(
            f"{path}: sizes of images cannot be read from it ({error}); expected lines of an id, a"
            ' tab and {"height": 480, "width": 640}, or JSON with width and height of each image'
        ) from error

    if not found:
        raise UsageError(f"{path}: holds no sizes of images; expected width and height of each")

    return found


def sizes_beside(path: str) -> str:
    """Return the path of the hw.tsv that belongs to a TSV of features, or "" if there is none."""
    place = Path(path)
    names = place.name.split(".")
    before = [".".join([*names[:-end], "hw", "tsv"]) for end in (1, 2) if len(names) > end]

    return next(
        (str(place.with_name(n)) for n in [*before, "hw.tsv"] if place.with_name(n).is_file()), ""
    )


def _of_lines(text: str) -> Iterator[tuple[str, Size]]:
    for line in text.splitlines():
        if not line.strip():
            continue

        name, _, value = line.partition("\t")
        value = value.strip()
        if value[:1] in ("{", "["):
            value = json.loads(value)
            yield name.strip(), _size(value[0] if isinstance(value, list) else value)
        else:
            height, width = value.split()
            yield name.strip(), (float(width), float(height))


def _of_json(value: Any) -> Iterator[tuple[str, Size]]:
    images = value if isinstance(value, list) else value.get("images")
    if not isinstance(images, list):
        for name, size in value.items():
            yield name, _size(size)

        return

    for image in images:
        number_ = next((image[name] for name in NUMBERS if name in image), None)
        if number_ is not None:
            yield str(number_), _size(image)

    for image in images:  # they come later, so they count more
        for name in ("file_name", "filename"):
            if name in image:
                yield str(image[name]), _size(image)
                yield Path(str(image[name])).stem, _size(image)


def _size(value: Mapping[str, Any]) -> Size:
    fields, _ = renamed(value)
    return number(fields, "width"), number(fields, "height")
