"""Read captions from a JSON file as a whole: find its records, whatever structure holds them."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.captions.columns import (
    are_enough,
    is_field,
    name_columns,
)
from megatron_interbert.preparation.building.captions.fields import plain, read_record
from megatron_interbert.preparation.building.captions.text_file import open_text
from megatron_interbert.preparation.building.captions.wrapping import (
    Placed,
    Wrapped,
    json_lines,
)

LOOKED_AT = 200  # records by which fields with unknown names are judged
SPLIT = re.compile("(?:re)?(?:train|val|valid|validation|test|dev)(?:_?(?:set|data|split))?")
Records = Iterator[tuple[str, Any]]


def whole_json(path: str) -> Wrapped:
    """Read a JSON file; raise UsageError if it holds no records in any known structure."""
    value = load_json(path)
    kind, words, make = structure(value)
    if kind == "":
        raise UsageError(
            f"--captions {path}: JSON without captions in it ({words}); expected a list of records,"
            " COCO's or Karpathy's object, or names of images with captions"
        )

    return Wrapped(kind, words, lambda: _as_records(make(value)))


def lines_of_json(path: str) -> Wrapped:
    """Read an object on each line, whose fields may have unknown names."""
    wrapped = json_lines(path)
    first = itertools.islice(wrapped.records(), LOOKED_AT)
    meaning = unknown_fields([record for _, record in first if isinstance(record, Mapping)])
    if not meaning:
        return wrapped

    return Wrapped(
        wrapped.kind,
        f"{wrapped.words}, {in_words(meaning)}",
        lambda: ((place, renamed(record, meaning)) for place, record in wrapped.records()),
    )


def load_json(path: str) -> Any:
    """Load a JSON file; raise UsageError if it is damaged."""
    with open_text(path) as handle:
        try:
            return json.load(handle)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--captions {path}: not valid JSON ({error})") from error


def _as_records(items: Records) -> Iterator[Placed]:
    for place, item in items:
        yield (
            place,
            item
            if isinstance(item, Mapping)
            else f"is a {type(item).__name__}, expected an object",
        )


def structure(value: Any) -> tuple[str, str, Callable[[Any], Records]]:
    """Return (kind, in words, function that yields (place, record)) of the structure of a JSON
    value; an empty kind if it is none.
    """
    if isinstance(value, list):
        return _of_list(value)
    if not isinstance(value, dict):
        return "", f"it is a {type(value).__name__}", _nothing

    if isinstance(value.get("annotations"), list):
        return "coco", "COCO's images and annotations", _coco
    if isinstance(value.get("images"), list) and _has_texts(value["images"]):
        return (
            "karpathy",
            "Karpathy's images with sentences",
            lambda whole: _listed(whole["images"]),
        )

    lists = {name: part for name, part in value.items() if isinstance(part, list) and part}
    if _are_parallel(lists):
        return "sbu", f"lists of equal length: {', '.join(lists)}", lambda whole: _parallel(lists)
    if len(lists) > 1 and are_enough(list(lists)):
        lengths = ", ".join(f"{name} {len(part)}" for name, part in lists.items())
        return "", f"lists of unequal length: {lengths}", _nothing

    records = [name for name, part in lists.items() if _has_texts(part)]
    if len(records) == 1 and _name_images(lists[records[0]]):
        name = records[0]
        return "json", f"a list of records in {name!r}", lambda whole: _listed(whole[name])

    return _of_dictionary(value)


def _nothing(value: Any) -> Records:
    return iter(())


def _has_texts(records: Any) -> bool:
    return isinstance(records, list) and any(
        isinstance(record, Mapping) and read_record(record).texts for record in records[:LOOKED_AT]
    )


def _name_images(records: list[Any]) -> bool:
    found = [read_record(record) for record in records[:LOOKED_AT] if isinstance(record, Mapping)]
    return any(record.images or record.address for record in found)


def _of_list(value: list[Any]) -> tuple[str, str, Callable[[Any], Records]]:
    if _has_texts(value) and _name_images(value):
        return "json", "a JSON array of records", _listed
    if not value:
        return "", "an empty list", _nothing

    rows = [record for record in value[:LOOKED_AT] if isinstance(record, list)]
    fields = name_columns([[str(cell) for cell in row] for row in rows])
    if are_enough(fields):
        words = f"a JSON array of rows, read as {', '.join(name or '-' for name in fields)}"
        return "json", words, lambda whole: _rows(whole, fields)

    return _of_unknown_fields(value)


def _of_unknown_fields(value: list[Any]) -> tuple[str, str, Callable[[Any], Records]]:
    records = [record for record in value[:LOOKED_AT] if isinstance(record, Mapping)]
    meaning = unknown_fields(records)
    if not meaning:
        names = list(dict.fromkeys(name for record in records for name in record))
        what = f"objects with {', '.join(map(repr, names[:8]))}" if names else "something else"
        return "", f"a list of {what}", _nothing

    return (
        "json",
        f"a JSON array of records, {in_words(meaning)}",
        lambda whole: ((place, renamed(record, meaning)) for place, record in _listed(whole)),
    )


def unknown_fields(records: Sequence[Mapping[Any, Any]]) -> dict[Any, str]:
    """Find by looking which fields hold captions and images, where no known field does: field ->
    `caption`, `image` or `url`.

    Returns {} if nothing is missing, or if it is not found.
    """
    found = [read_record(record) for record in records]
    needed = set() if any(record.texts for record in found) else {"caption"}
    if not any(record.images or record.address for record in found):
        needed |= {"image", "url"}
    if not needed:
        return {}

    names = list(dict.fromkeys(name for record in records for name in record))
    table = [[_cell(record.get(name, "")) for name in names] for record in records]
    seen = zip(names, name_columns(table), strict=False)
    meaning = {name: field for name, field in seen if field in needed}
    completed = [read_record(renamed(record, meaning)) for record in records]
    enough = any(record.texts and (record.images or record.address) for record in completed)

    return meaning if enough else {}


def in_words(meaning: Mapping[Any, str]) -> str:
    """Say which fields are read as what."""
    return ", ".join(f"{name!r} read as {field}" for name, field in meaning.items())


def renamed(record: Any, meaning: Mapping[Any, str]) -> Any:
    """Return a record with what its fields of unknown names hold under names that are known."""
    if not isinstance(record, Mapping):
        return record

    return {**record, **{field: record[name] for name, field in meaning.items() if name in record}}


def _cell(value: Any) -> str:
    """Return a value as a cell of a table: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _of_dictionary(value: dict[str, Any]) -> tuple[str, str, Callable[[Any], Records]]:
    found = read_record(value)
    if are_enough(list(value)) or (found.texts and (found.images or found.address)):
        if all(isinstance(part, Mapping) for part in value.values()):
            return "json", f"columns {', '.join(value)}", _columns
        return "jsonl", "one JSON object", lambda whole: iter([("record 1", whole)])

    fields = [name for name in value if is_field(name)]
    if not fields and any(_captions_of(part) for part in value.values()):
        return "json-dict", "names of images, each with its captions", _dictionary

    return "", f"an object with {', '.join(map(repr, list(value)[:5]))}", _nothing


def _captions_of(value: Any) -> bool:
    """Check whether the value of an image in a dictionary has captions: texts or records."""
    if isinstance(value, list):
        return any(_captions_of(part) for part in value)
    if isinstance(value, Mapping):
        return bool(read_record(value).texts)

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
    """Yield the captions of images by name; records that name their images themselves, or are of a
    split, may be listed by split instead.
    """
    for key, value in whole.items():
        for part in value if isinstance(value, list) else [value]:
            record = part if isinstance(part, Mapping) else {"caption": part}
            found = read_record(record)
            own = found.images or (found.address and SPLIT.fullmatch(key.lower()))
            yield f"{key[:80]!a}", {"split": key, **record} if own else {"image_id": key, **record}
