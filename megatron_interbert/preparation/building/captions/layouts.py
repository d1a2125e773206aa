"""Read captions from a JSON file as a whole: find its records, whatever structure holds them."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.captions.columns import are_enough, name_columns
from megatron_interbert.preparation.building.captions.fields import is_field, read_record, task_of
from megatron_interbert.preparation.building.captions.text_file import open_text
from megatron_interbert.preparation.building.captions.texts import (
    are_by_language,
    by_plain_name,
    plain,
    text_fields,
)
from megatron_interbert.preparation.building.captions.unknown import (
    LOOKED_AT,
    in_words,
    names_of_fields,
    unknown_fields,
    with_known_names,
)
from megatron_interbert.preparation.building.captions.wrapping import Placed, Wrapped

MOST_SPLITS = 20  # parts of an object that may be lists of records
MOST_FIELDS = 0.05  # the share of names of images that may be those of fields, such as `photo`
Records = Iterator[tuple[str, Any]]


class Structure(NamedTuple):
    """Hold how a JSON value wraps records: one of the formats of --captions-format ("" if it holds
    none), in words, and a function that yields (place, record).
    """

    kind: str
    words: str
    records: Callable[[], Records] = lambda: iter(())


def whole_json(path: str) -> Wrapped:
    """Read a JSON file; raise UsageError if it holds no records in any known structure."""
    value = load_json(path)
    try:
        found = structure(value)
    except UsageError as error:
        raise UsageError(f"--captions {path}: {error}") from error

    if found.kind == "":
        raise UsageError(
            f"--captions {path}: JSON without captions in it ({found.words}); expected a list of"
            " records, COCO's or Karpathy's object, or names of images with captions"
        )

    return Wrapped(found.kind, found.words, lambda: _as_records(found.records()))


def load_json(path: str) -> Any:
    """Load a JSON file; raise UsageError if it is damaged."""
    with open_text(path) as handle:
        try:
            return json.load(handle)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"--captions {path}: not valid JSON ({error}); expected one array or object, or an"
                " object on each line"
            ) from error


def _as_records(items: Records) -> Iterator[Placed]:
    for place, item in items:
        yield (
            place,
            item
            if isinstance(item, Mapping)
            else f"is a {type(item).__name__}, expected an object",
        )


def structure(value: Any) -> Structure:
    """Find out how a JSON value wraps records."""
    if isinstance(value, list):
        return _of_list(value)
    if not isinstance(value, dict):
        return Structure("", f"it is a {type(value).__name__}")

    images = value.get("images")
    if isinstance(value.get("annotations"), list):
        return Structure("coco", "COCO's images and annotations", lambda: _coco(value))
    if isinstance(images, list) and _has_texts(images):
        return Structure("karpathy", "Karpathy's images with sentences", lambda: _listed(images))

    return _of_columns(value) or _of_lists(value) or _of_images(value)


def _has_texts(records: Any) -> bool:
    return isinstance(records, list) and any(
        isinstance(record, Mapping) and read_record(record).texts for record in records[:LOOKED_AT]
    )


def _name_images(records: list[Any]) -> bool:
    """Check whether records name their images: by themselves, or by addresses that differ."""
    found = [read_record(record) for record in records[:LOOKED_AT] if isinstance(record, Mapping)]
    addresses = [record.address for record in found if record.address]
    differ = len(set(addresses)) > 1 or len(found) == len(addresses) == 1

    return any(record.images for record in found) or differ


def _of_list(value: list[Any]) -> Structure:
    if not value:
        return Structure("", "an empty list")
    if _has_texts(value) and _name_images(value):
        return Structure("json", "a JSON array of records", lambda: _listed(value))

    rows = [record for record in value[:LOOKED_AT] if isinstance(record, list)]
    fields = name_columns([[str(cell) for cell in row] for row in rows])
    if are_enough(fields):
        words = f"a JSON array of rows, read as {', '.join(name or '-' for name in fields)}"
        return Structure("json", words, lambda: _rows(value, fields))

    records = [record for record in value[:LOOKED_AT] if isinstance(record, Mapping)]
    meaning = unknown_fields(records)
    if meaning:
        return Structure(
            "json",
            f"a JSON array of records, {in_words(meaning)}",
            lambda: ((place, with_known_names(item, meaning)) for place, item in _listed(value)),
        )

    task = task_of(records)
    if task:
        return Structure("", f"records of {task}")
    names = names_of_fields(records)

    return Structure("", f"a list of objects with {names}" if names else "a list of something else")


def _of_columns(value: dict[str, Any]) -> Structure | None:
    """Find records in an object whose names are those of fields."""
    names = value.get("columns")
    rows = value.get("data")
    if isinstance(names, list) and isinstance(rows, list) and are_enough(list(map(str, names))):
        return Structure("json", "rows of pandas", lambda: _rows(rows, list(map(str, names))))

    fields = [name for name in value if is_field(name)]
    if not fields:
        return None

    lists = {name: part for name, part in value.items() if isinstance(part, list) and part}
    if _are_parallel(lists):
        words = f"lists of equal length: {', '.join(lists)}"
        return Structure("sbu", words, lambda: _parallel(lists))
    if len(lists) > 1 and are_enough(list(lists)):
        lengths = ", ".join(f"{name} {len(part)}" for name, part in lists.items())
        return Structure("", f"lists of unequal length: {lengths}")

    if are_enough(fields) and all(isinstance(part, Mapping) for part in value.values()):
        return Structure("json", f"columns {', '.join(value)}", lambda: _columns(value))

    found = read_record(value)
    if found.texts and (found.images or found.address):
        return Structure("jsonl", "one JSON object", lambda: iter([("record 1", value)]))

    return None


def _of_lists(value: dict[str, Any]) -> Structure | None:
    """Find lists of records in an object: one, or one for each split."""
    lists = {name: part for name, part in value.items() if isinstance(part, list)}
    if len(lists) > MOST_SPLITS:
        return None

    found = [name for name, part in lists.items() if _has_texts(part) and _name_images(part)]
    if len(found) == 1:
        words = f"a list of records in {found[0]!r}"
        return Structure("json", words, lambda: _listed(lists[found[0]]))
    if found:
        words = f"lists of records in {', '.join(map(repr, found))}"
        return Structure("json", words, lambda: _splits({name: lists[name] for name in found}))

    return None


def _of_images(value: dict[str, Any]) -> Structure:
    """Find captions in an object whose names are those of images, perhaps in one for each split."""
    known = sum(map(is_field, value))
    first = list(itertools.islice(value.values(), LOOKED_AT))

    if known <= MOST_FIELDS * len(value) and any(map(_are_captions, first)):
        return Structure(
            "json-dict", "names of images, each with its captions", lambda: _dictionary(value)
        )

    inner = [part for part in first if isinstance(part, Mapping)]
    names = [*value, *(name for part in inner for name in part)]
    by_split = len(inner) == len(value) <= MOST_SPLITS and not any(map(is_field, names))
    if by_split and any(_are_captions(p) for part in inner for p in part.values()):
        words = f"names of images, each with its captions, in {', '.join(map(repr, value))}"
        return Structure("json-dict", words, lambda: _dictionaries(value))

    return Structure("", f"an object with {', '.join(map(repr, list(value)[:5]))}")


def _are_captions(value: Any) -> bool:
    """Check whether the value of an image has captions: texts, also by language, or records."""
    if isinstance(value, list):
        return any(map(_are_captions, value))
    if isinstance(value, Mapping):
        return are_by_language(value) or bool(text_fields(by_plain_name(value)))

    return isinstance(value, str)


def _coco(whole: dict[str, Any]) -> Records:
    """Yield the annotations, each with the file of its image; their own numbers are no images."""
    images = whole.get("images")
    images = images if isinstance(images, list) else []
    files = {
        str(image["id"]): image.get("file_name")
        for image in images
        if isinstance(image, Mapping) and "id" in image
    }

    for number, annotation in enumerate(whole["annotations"], 1):
        if isinstance(annotation, Mapping):
            file = files.get(str(annotation.get("image_id")))
            annotation = {name: part for name, part in annotation.items() if name != "id"}
            annotation |= {"file_name": file} if file else {}
        yield f"annotation {number}", annotation


def _listed(records: list[Any]) -> Records:
    return ((f"record {number}", record) for number, record in enumerate(records, 1))


def _splits(lists: dict[str, list[Any]]) -> Records:
    for name, records in lists.items():
        for number, record in enumerate(records, 1):
            own = isinstance(record, Mapping)
            yield f"{name!a}, record {number}", {"split": name, **record} if own else record


def _rows(rows: list[Any], fields: list[str]) -> Records:
    for number, row in enumerate(rows, 1):
        fits = isinstance(row, list) and len(row) == len(fields)
        yield f"record {number}", dict(zip(fields, row, strict=True)) if fits else row


def _are_parallel(lists: dict[str, list[Any]]) -> bool:
    """Check whether lists hold one field each of the same records."""
    if len(lists) < 2 or len(set(map(len, lists.values()))) > 1:
        return False

    rows = itertools.islice(zip(*lists.values(), strict=True), LOOKED_AT)
    found = [read_record(dict(zip(lists, row, strict=True))) for row in rows]

    return any(record.texts and (record.images or record.address) for record in found)


def _parallel(lists: dict[str, list[Any]]) -> Records:
    for number, parts in enumerate(zip(*lists.values(), strict=True), 1):
        yield f"record {number}", dict(zip(lists, parts, strict=True))


def _columns(whole: dict[str, dict[str, Any]]) -> Records:
    for row in next(iter(whole.values())):
        yield f"record {row}", {plain(name): column.get(row) for name, column in whole.items()}


def _dictionary(whole: dict[str, Any]) -> Records:
    """Yield the captions of images by name; records may name their images themselves."""
    for key, value in whole.items():
        for part in value if isinstance(value, list) else [value]:
            whole = isinstance(part, Mapping) and not are_by_language(part)
            record = part if whole else {"caption": part}
            own = bool(read_record(record).images)
            yield f"{key[:80]!a}", record if own else {"image_id": key, **record}


def _dictionaries(whole: dict[str, dict[str, Any]]) -> Records:
    for split, images in whole.items():
        for place, record in _dictionary(images):
            yield f"{split!a}, {place}", {"split": split, **record}
