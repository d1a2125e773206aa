"""Read image names, captions, language and split from one record, whatever its data set calls them.

A new spelling of a field is one more word in a table here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_interbert.data.image_names import LONG_STEM, ImageName
from megatron_interbert.preparation.building.captions.texts import (
    LANGUAGES,
    TEXTS,
    Text,
    by_plain_name,
    is_several,
    plain,
    text_fields,
    texts_in,
)

# Fields that name an image, the most reliable first: its file, its number, where it came from.
FILES = (
    *("image", "image_path", "img_path", "image_file", "image_filename", "file_name", "filename"),
    *("file", "img", "img_fn", "image_name", "img_name", "photo", "picture"),
    *("path", "images", "dir", "jpg", "png"),
)
NUMBERS = (
    *("image_id", "img_id", "imageid", "cocoid", "coco_id", "image_key", "image_ids"),
    *("main_image_id", "item_ids", "item_id", "product_id", "goods_id", "sku", "sku_id", "asin"),
    *("photo_id", "key"),
)
ADDRESSES = (
    "url",
    "urls",
    "image_url",
    "image_urls",
    "img_url",
    "image_src",
    "photo_url",
    "pict_url",
    "flickr_url",
)
LAST = ("id", "uid", "uuid", "imgid", "name")  # may be the number of a caption: if nothing else
SPLITS = ("split", "set_name", "subset")
REJECTED = ("is_rejected", "is_precanned")  # VizWiz
KNOWN = frozenset(
    [*FILES, *NUMBERS, *ADDRESSES, *LAST, *LANGUAGES, *SPLITS, *(n for row in TEXTS for n in row)]
)
# fields of records whose texts do not say what the image shows
OTHER_TASKS = {
    "gold_label": "SNLI-VE, whose sentences may contradict the image",
    "rationale_orig": "VCR: interbert finetune vcr reads it",
    "target_hard": "CIRR, whose captions tell two images apart",
    "candidate": "Fashion-IQ, whose captions tell two images apart",
    "left_url": "NLVR2, whose sentences are about two images",
    "img0": "NLVR2, whose sentences are about two images",
    "conversations": "LLaVA, whose answers are of many kinds",
}
LONGEST_NAME = 1024  # characters; longer ones are photos in base64


@dataclass
class Found:
    """Hold what a record says: captions, and for each image that they describe its names.

    `named_by` are the fields of the names of a single image.
    """

    images: list[list[str]] = field(default_factory=list)
    named_by: tuple[str, ...] = ()
    texts: list[Text] = field(default_factory=list)
    language: Any = ""
    split: str = ""
    rejected: str = ""  # why the data set itself does not use it
    address: str = ""  # where the image came from, if nothing else names it
    other_task: str = ""
    chosen: tuple[str, str] = ("", "")  # fields of the image and of the text


def read_record(record: Mapping[Any, Any]) -> Found:
    """Find the images and captions of a record; both are empty where it has none."""
    values = by_plain_name(record)
    found = Found(texts=list(texts_in(values)))
    image_field = _read_images(values, found)
    found.language = _first(values, LANGUAGES)
    found.split = str(_first(values, SPLITS))
    found.rejected = next((n for n in REJECTED if str(values.get(n)).lower() in ("true", "1")), "")
    found.other_task = next((task for name, task in OTHER_TASKS.items() if name in values), "")
    found.chosen = (image_field, ", ".join(text_fields(values)))

    return found


def task_of(records: Iterable[Any]) -> str:
    """Return the other task that some records are of, "" if none."""
    found = (read_record(record) for record in records if isinstance(record, Mapping))
    return next((record.other_task for record in found if record.other_task), "")


def is_field(name: Any) -> bool:
    """Check whether a name is that of a field that we know."""
    return plain(name) in KNOWN or is_several(plain(name))


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if name in values), "")


def _read_images(values: Mapping[str, Any], found: Found) -> str:
    """Set the images of a record and return the field of their most reliable name."""
    present = sorted(
        (name for name in (*FILES, *NUMBERS) if name in values),
        key=lambda name: _is_photo(values[name]),  # whose path may have lost its folders
    )
    named = [(name, names_of(_without_fraction(name, values[name]))) for name in present]
    named = [(name, names) for name, names in named if names]
    addresses = [name for name, names in named if is_address(names[0])]
    others = [(name, names) for name, names in named if name not in addresses]
    addresses += [name for name in ADDRESSES if name in values]
    if not others:
        others = [(n, names_of(values[n])) for n in LAST if n in values and names_of(values[n])][:1]

    if others:
        first, images = others[0]
        found.images = [[name] for name in images]
        if len(images) == 1:
            more = [(name, names[0]) for name, names in others[1:] if len(names) == 1]
            more += [(name, _telling_address(values[name])) for name in addresses[:1]]
            more = [(name, text) for name, text in more if text]
            found.images[0] += [text for _, text in more]
            found.named_by = (first, *(name for name, _ in more))
        return first

    if addresses:
        found.address = (names_of(values[addresses[0]]) or [""])[0]

    return addresses[0] if addresses else ""


def is_address(name: str) -> bool:
    """Check whether a name is an address on the web."""
    return name.startswith(("http://", "https://"))


def _telling_address(value: Any) -> str:
    """Return the first address in a field, if its file name tells the image from others."""
    address = next(iter(names_of(value)), "")
    return address if is_telling(address) else ""


def is_telling(address: str) -> bool:
    """Check whether the file name in an address is unlikely to be that of another image too."""
    return len(ImageName(address).stem) >= LONG_STEM


def _is_photo(value: Any) -> bool:
    return isinstance(value, Mapping) and "path" in value


def _without_fraction(name: str, value: Any) -> Any:
    """Return a number as pandas writes it in a column with gaps, `9.0`, as it was; keys of tar
    files may look alike.
    """
    if name in NUMBERS and name != "key" and isinstance(value, str):
        return re.sub(r"^\s*(\d+)\.0\s*$", r"\1", value)

    return value


def names_of(value: Any) -> list[str]:
    """Return the names in a field: of one image, or of several in a list."""
    if isinstance(value, Mapping):  # a photo of Hugging Face's datasets: its bytes and its path
        value = value.get("path") or value.get("file_name") or value.get("id")
    if isinstance(value, list | tuple):
        return [name for part in value for name in names_of(part)]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        return []

    name = str(value).strip()

    return [name] if 0 < len(name) <= LONGEST_NAME else []
