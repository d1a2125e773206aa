"""Find the fields of a published record: a mapping from any names to values, which are arrays,
lists, base64 text, or text of those.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_interbert.preparation.building.captions.texts import clean_captions
from megatron_interbert.preparation.building.sources import boxes as box_kinds
from megatron_interbert.preparation.building.sources.encoded import (
    FLOAT32,
    array_of,
    bytes_of,
    decoded,
    holds_text,
    trimmed,
    unquoted,
)
from megatron_interbert.preparation.building.sources.fields import (
    BACKGROUND_FIRST,
    BACKGROUND_NONE,
    BadRecord,
    number,
)
from megatron_interbert.preparation.building.sources.names import (
    COUNT_BACKGROUND,
    OF_REGIONS,
    ours,
    renamed,
)

SINGLE = ("image_id", "width", "height", "num_boxes")
OBJECT_LISTS = ("objects", "regions", "instances", "detections")
CONTAINERS = (list, tuple, dict, set, frozenset)
FILE_ENDINGS = (".npz", ".npy")  # some name an image by the file of its features


@dataclass
class Fields:
    """Hold the fields of a record for make_regions, how they were found, and its captions.

    boxes: PIXELS or SHARES if the record itself tells, "" if both are possible. named: the boxes
    are in a field for shares. by_name: classes were given by names, so their numbers are ours.
    """

    values: dict[str, Any]
    spelled: dict[str, str]
    scheme: str = BACKGROUND_NONE
    boxes: str = ""
    named: bool = False
    by_name: bool = False
    notes: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)


def fields_of(
    values: Mapping[Any, Any],
    name: str,
    sizes: Mapping[str, tuple[float, float]],
    classes: Mapping[str, int],
    floats: np.dtype = FLOAT32,
) -> Fields:
    """Return the fields of a record; raise BadRecord if it is malformed.

    name: of the image, if the record itself has none. sizes: of images whose records have none.
    classes: number of each name of a class, background counted; empty: unknown. floats: type of
    features in base64.
    """
    raw, spelled = renamed(spread(values))
    raw = {key: unquoted(value) for key, value in raw.items()}
    found = Fields({}, {key: str(value) for key, value in spelled.items()})

    for key in SINGLE:
        if isinstance(raw.get(key), CONTAINERS):  # NumPy would make one array of it, of any size
            raise BadRecord(f"{key} is not a single value", f"a {type(raw[key]).__name__}")

    found.values["image_id"] = image_name(raw.get("image_id", name))
    rows = _add_features(found, raw, values, floats)
    _add_boxes(found, raw, rows or len(found.values["features"]))
    if not rows:
        rows = _cut_padding(found.values)
    _add_size(found, raw, sizes)
    _add_labels(found, raw, rows or len(found.values["features"]))
    _add_named_classes(found, raw, classes)
    _add_attributes(found, raw, rows or len(found.values["features"]))
    if not found.named:
        size = found.values.get("width"), found.values.get("height")
        known = None if None in size else size
        found.boxes = box_kinds.measure(found.values["boxes"], known)

    found.captions = clean_captions(raw.get("caption"))

    return found


def _add_features(
    found: Fields, raw: dict[str, Any], values: Mapping[Any, Any], floats: np.dtype
) -> int:
    """Add features [R, F], and the boxes at their end to `raw`; return the number of regions that
    the record states (0: none).
    """
    if "features" not in raw:
        if any(isinstance(v, list) and not v for k, v in values.items() if k in OBJECT_LISTS):
            raise BadRecord("no regions", "an empty list of objects")

        there = ", ".join(map(str, sorted(values, key=str)))[:200]
        raise BadRecord("'features' is missing", f"found {there}")

    rows = _rows(raw)
    features = array_of(raw["features"], rows, floats, "features")
    features = trimmed(_by_region(features, raw.get("boxes"), rows), rows, "features")
    features, last = box_kinds.split_features(features)
    if last is not None:
        raw.setdefault("shares", last)
        found.notes.append("the box numbers at the end of the features are cut off")

    found.values["features"] = features

    return rows


def spread(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a record in which nested dictionaries (such as `info`), and a list of objects with
    fields of their own, stand beside the rest as fields.
    """
    flat: dict[Any, Any] = {}

    for name, value in values.items():
        if isinstance(value, np.ndarray) and value.dtype == object and value.shape == ():
            value = value.item()
        if isinstance(value, dict):
            flat = {**spread(value), **flat}
        elif name in OBJECT_LISTS and isinstance(value, list) and _all_dictionaries(value):
            keys = set.intersection(*(set(item) for item in value))
            keys = sorted((key for key in keys if ours(key) in OF_REGIONS), key=str)
            flat = {**{key: [item[key] for item in value] for key in keys}, **flat}
        else:
            flat[name] = value

    return flat


def _all_dictionaries(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def image_name(value: Any) -> str:
    """Return the name of an image as text, without the ending of a file of features; raise
    BadRecord if it is not one value.
    """
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise BadRecord("image_id is not a single value", f"an array {value.shape}")
        value = value.reshape(()).item()
    if isinstance(value, np.generic):
        value = value.item()

    value = unquoted(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)

    name = str(value).strip()
    for ending in FILE_ENDINGS:
        if name.lower().endswith(ending) and len(name) > len(ending):
            name = name[: -len(ending)]

    return name


def _rows(raw: Mapping[str, Any]) -> int:
    """Return the number of regions that a record states, 0 if it states none and arrays tell."""
    if "num_boxes" in raw:
        rows = number(raw, "num_boxes")
        if rows < 1 or rows != int(rows):
            raise BadRecord("no regions", f"num_boxes is {rows:g}")
        return int(rows)

    boxes = raw.get("boxes", raw.get("shares"))
    if isinstance(raw["features"], str | bytes) and isinstance(boxes, str | bytes):
        return len(bytes_of(boxes, "boxes")) // 16  # four floats each
    if isinstance(raw["features"], str | bytes) and isinstance(boxes, list | np.ndarray):
        return len(boxes)

    return 0


def _by_region(features: np.ndarray, boxes: Any, rows: int) -> np.ndarray:
    """Return features with regions first: some publish [F, R]."""
    regions = rows or (len(boxes) if isinstance(boxes, np.ndarray) and boxes.ndim == 2 else 0)
    if regions and features.ndim == 2 and len(features) != regions == features.shape[1]:
        return features.T

    return features


def _add_boxes(found: Fields, raw: Mapping[str, Any], rows: int) -> None:
    """Add boxes [R, 4]: those in pixels if there are both."""
    name = "boxes" if "boxes" in raw else "shares"
    if name not in raw:
        there = ", ".join(found.spelled.values())
        raise BadRecord(
            "'boxes' is missing",
            f"found {there}; without boxes there is nothing to train on: give features with boxes",
        )

    value = raw[name]
    if isinstance(value, str | bytes):
        value = box_kinds.decode_boxes(bytes_of(value, name), rows)

    found.named = name == "shares"
    boxes = array_of(value, rows, np.float32, "boxes")
    found.values["boxes"] = box_kinds.corners(trimmed(boxes, rows, "boxes"))


def _cut_padding(values: dict[str, Any]) -> int:
    """Remove regions at the end whose features and boxes are zero, by which records that state no
    number of regions may be padded; return how many are left.
    """
    if len(values["features"]) != len(values["boxes"]):
        return 0  # reported later

    filled = values["features"].any(axis=1) | values["boxes"].any(axis=1)
    if not filled.any():
        raise BadRecord("no regions", "all features and boxes are zero")

    rows = int(np.flatnonzero(filled)[-1]) + 1
    values |= {name: values[name][:rows] for name in ("features", "boxes")}

    return rows


def _add_size(
    found: Fields, raw: Mapping[str, Any], sizes: Mapping[str, tuple[float, float]]
) -> None:
    """Add width and height if anything tells them."""
    if "width" in raw and "height" in raw:
        found.values |= {name: number(raw, name) for name in ("width", "height")}
        return

    size = raw.get("image_sizes")
    if size is None and "image_hw" in raw:
        size = np.asarray(raw["image_hw"]).reshape(-1)[::-1]
    if size is None:
        name = found.values["image_id"]
        size = sizes.get(name, sizes.get(name.rsplit("/", 1)[-1]))
    if size is None and "boxes" in raw and "shares" in raw:
        shares = array_of(raw["shares"], len(found.values["boxes"]), np.float32, "boxes")
        size = box_kinds.size_of_image(found.values["boxes"], shares)
    if size is not None:
        pair = [float(v) for v in np.asarray(size).reshape(-1)]
        if len(pair) != 2:
            raise BadRecord("image size is not two numbers", f"{len(pair)}")
        found.values |= {"width": pair[0], "height": pair[1]}


def _add_labels(found: Fields, raw: Mapping[str, Any], rows: int) -> None:
    """Add class_probs, class_ids and class_confidence, told apart by their shapes."""
    for name, dtypes in (
        ("class_probs", ("f4",)),
        ("class_confidence", ("f4", "f8", "f2")),
        ("class_ids", ("i8", "i4")),
    ):
        value = raw.get(name)
        if value is None:
            continue
        if name == "class_ids" and _are_words(value):
            continue
        if isinstance(value, str | bytes):
            value = decoded(value, rows, dtypes, name)

        array = trimmed(array_of(value, rows, dtypes[0], name), rows, name)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if name == "class_ids":
            if array.dtype.kind == "f" and array.size and (array == np.floor(array)).all():
                array = array.astype(np.int64)
            scheme = COUNT_BACKGROUND.get(found.spelled["class_ids"].lower(), BACKGROUND_NONE)
            found.scheme = scheme
        elif array.ndim == 2:
            name = "class_probs"
        elif array.ndim == 1:
            name = "class_confidence"

        found.values.setdefault(name, array)


def _add_named_classes(found: Fields, raw: Mapping[str, Any], classes: Mapping[str, int]) -> None:
    """Add the classes of regions that are given by names."""
    words = raw["class_ids"] if _are_words(raw.get("class_ids")) else raw.get("class_names")
    if not classes or not _are_words(words) or "class_ids" in found.values:
        return

    known = [classes.get(str(word).strip().lower(), -1) for word in words]
    if -1 in known:
        raise BadRecord("a class that is not in --class-names", str(words[known.index(-1)])[:60])

    found.values["class_ids"] = trimmed(np.array(known), len(found.values["features"]), "class_ids")
    found.scheme = BACKGROUND_FIRST
    found.by_name = True


def _add_attributes(found: Fields, raw: Mapping[str, Any], rows: int) -> None:
    """Add attribute_ids and attribute_confidence; what cannot be read fits no region."""
    for name, dtypes in (
        ("attribute_ids", ("i8", "i4")),
        ("attribute_confidence", ("f4", "f8", "f2")),
    ):
        value = raw.get(name)
        if value is None:
            continue

        try:
            if isinstance(value, str | bytes):
                value = decoded(value, rows, dtypes, name)
            array = trimmed(array_of(value, rows, dtypes[0], name), rows, name)
        except BadRecord:
            array = np.zeros(0, np.int64)

        if array.dtype.kind == "f" and name == "attribute_ids" and (array == array.round()).all():
            array = array.astype(np.int64)
        found.values[name] = array


def _are_words(value: Any) -> bool:
    """Tell whether classes are given by their names instead of numbers."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "USO"

    return isinstance(value, list | tuple) and holds_text(value)
