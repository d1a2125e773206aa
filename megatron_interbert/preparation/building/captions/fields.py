"""Read image names, captions, language and split from one record, whatever its data set calls them.

A new spelling of a field is one more word in a table here.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Fields that name an image, the most reliable first: its file, its number, where it came from.
FILES = (
    *("image", "image_path", "img_path", "image_file", "image_filename", "file_name", "filename"),
    *("file", "img", "img_fn", "image_name", "img_name", "photo", "picture"),
    *("path", "images", "dir", "jpg", "png"),
)
NUMBERS = (
    *("image_id", "img_id", "imageid", "cocoid", "coco_id", "image_key", "image_ids"),
    *("item_ids", "item_id", "product_id", "goods_id", "sku", "sku_id", "photo_id", "key"),
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
# Fields with captions: the first row of which a record has any is read, and its first field.
TEXTS = (
    ("caption", "captions", "caption_str", "caption_text", "image_caption"),
    ("sentences", "sentence", "sents", "sent", "sentf", "sentences_raw"),
    ("raw",),
    ("text", "texts", "txt"),
    ("phrase", "phrases", "regions"),
    (
        "caption_reference_description",
        "caption_alt_text_description",
        "caption_attribution_description",
    ),
    ("title", "item_title", "item_name", "product_title", "product_name", "goods_name"),
    ("query_text", "query"),
    ("comment", "comments", "description", "descriptions", "alt_text", "alttext", "alt"),
    ("annotations",),
)
# caption_0, caption_1, ..; caption_en, caption_zh, ..
SEVERAL = re.compile(r"^(caption|text|sentence|comment|description)s?_?(\d+|en|zh|de|fr|ja|cs)$")
LANGUAGE = re.compile(r"^[a-z]{2,3}([-_][A-Za-z]{2,4})?$")
FREQUENT = frozenset(("en", "zh", "de", "fr", "ja", "es"))
LANGUAGES = ("lang", "language", "locale", "caption_language", "language_code")
SPLITS = ("split", "set_name", "subset")
REJECTED = ("is_rejected", "is_precanned")  # VizWiz
QUESTIONS = re.compile("qa|question")  # parts of a record that are no captions (LXMERT)
KNOWN = frozenset(
    [*FILES, *NUMBERS, *ADDRESSES, *LAST, *LANGUAGES, *SPLITS, *(n for row in TEXTS for n in row)]
)
LONGEST_NAME = 1024  # characters; longer ones are photos in base64


@functools.lru_cache(maxsize=4096)
def plain(name: Any) -> str:
    """Return the name of a field in lower case, `_` between words: `Image Path` -> image_path."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name).strip())
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


@dataclass
class Found:
    """Hold what a record says: captions, and for each image that they describe its names."""

    images: list[list[str]] = field(default_factory=list)
    texts: list[Any] = field(default_factory=list)
    language: Any = ""
    split: str = ""
    rejected: str = ""  # why the data set itself does not use it
    address: str = ""  # where the image came from, if nothing else names it
    chosen: tuple[str, str] = ("", "")  # fields of the image and of the text


def read_record(record: Mapping[Any, Any]) -> Found:
    """Find the images and captions of a record; both are empty where it has none."""
    values = {plain(name): value for name, value in record.items() if not _is_nothing(value)}
    found = Found()
    text_field = _text_field(values)
    for name in text_field:
        found.texts += list(texts_of(values[name]))

    image_field = _read_images(values, found)
    found.language = _first(values, LANGUAGES)
    found.split = str(_first(values, SPLITS))
    found.rejected = next((n for n in REJECTED if str(values.get(n)).lower() in ("true", "1")), "")
    found.chosen = (image_field, ", ".join(text_field))

    return found


def _is_nothing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if name in values), "")


def _text_field(values: Mapping[str, Any]) -> list[str]:
    """Return the fields that hold the captions of a record: one, or several, by number or by
    language.
    """
    for row in TEXTS:
        for name in row:
            if name in values:
                return [name]

    several = [name for name in values if SEVERAL.match(name)]
    records = {name: part for name, part in values.items() if isinstance(part, Mapping)}

    return several or (_by_language(records) if _are_languages(records) else [])


def _by_language(records: Mapping[str, Mapping[Any, Any]]) -> list[str]:
    """Return the names of the records that hold captions (Crossmodal-3600)."""
    return [
        name for name, part in records.items() if _text_field({plain(n): part[n] for n in part})
    ]


def texts_of(value: Any) -> Iterator[Any]:
    """Yield the captions in a value: a text, a list of them or of records with one, texts by
    language, or lists by where they come from, of which questions are left out.
    """
    value = json_in_cell(value)

    if isinstance(value, Mapping):
        inner = _text_field({plain(name): part for name, part in value.items()})
        lists = all(isinstance(part, list | tuple) for part in value.values())
        parts = [part for name, part in value.items() if plain(name) in inner]
        if (lists or _are_languages(value)) and not inner:  # by where they come from, by language
            parts = [part for name, part in value.items() if not QUESTIONS.search(plain(name))]
        for part in parts:
            yield from texts_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_of(part)
    else:
        yield value


def _are_languages(names: Iterable[Any]) -> bool:
    """Check whether some names are those of languages, one of them a frequent one."""
    return all(LANGUAGE.match(str(name)) for name in names) and not FREQUENT.isdisjoint(names)


def json_in_cell(value: Any) -> Any:
    """Return the list or record of a cell of a table that holds one as JSON, else the value."""
    if isinstance(value, str) and value.startswith(('["', "[{", '{"')):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)

    return value


def _read_images(values: Mapping[str, Any], found: Found) -> str:
    """Set the images of a record and return the field of their most reliable name."""
    present = [name for name in (*FILES, *NUMBERS) if name in values]
    named = [(name, _names(_without_fraction(name, values[name]))) for name in present]
    named = [(name, names) for name, names in named if names]
    addresses = [name for name, names in named if names[0].startswith(("http://", "https://"))]
    others = [(name, names) for name, names in named if name not in addresses]
    addresses += [name for name in ADDRESSES if name in values]
    if not others:
        others = [(n, _names(values[n])) for n in LAST if n in values and _names(values[n])][:1]

    if others:
        first, images = others[0]
        found.images = [[name] for name in images]
        if len(images) == 1:
            found.images[0] += [n for _, names in others[1:] if len(names) == 1 for n in names]
            found.images[0] += [n for field_ in addresses[:1] for n in _names(values[field_])[:1]]
        return first

    if addresses:
        found.address = (_names(values[addresses[0]]) or [""])[0]

    return addresses[0] if addresses else ""


def _without_fraction(name: str, value: Any) -> Any:
    """Return a number as pandas writes it in a column with gaps, `9.0`, as it was; keys of tar
    files may look alike.
    """
    if name in NUMBERS and name != "key" and isinstance(value, str):
        return re.sub(r"^\s*(\d+)\.0\s*$", r"\1", value)

    return value


def _names(value: Any) -> list[str]:
    """Return the names in a field: of one image, or of several in a list."""
    if isinstance(value, Mapping):  # a photo of Hugging Face's datasets: its bytes and its path
        value = value.get("path") or value.get("file_name") or value.get("id")
    if isinstance(value, list | tuple):
        return [name for part in value for name in _names(part)]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        return []

    name = str(value).strip()

    return [name] if 0 < len(name) <= LONGEST_NAME else []
