"""Read JSON Lines files, one JSON object per line, and check entries of JSON files."""

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_text

Kind = type | tuple[type, ...]
NO_OTHERS: Mapping[str, str] = MappingProxyType({})


def read_records(
    path: str,
    flag: str,
    keys: Mapping[str, Kind],
    other_names: Mapping[str, str] = NO_OTHERS,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`PATH: line N`, record) for each line that is not empty; keys with `other_names` get
    ours.

    Raises UsageError that names the line if it is not a JSON object, lacks one of the `keys`, or
    holds a value of another type there.
    """
    yield from parse_records(read_text(path, flag), path, flag, keys, other_names)


def parse_records(
    text: str,
    path: str,
    flag: str,
    keys: Mapping[str, Kind],
    other_names: Mapping[str, str] = NO_OTHERS,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of the text of a file; see `read_records`."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue

        where = f"{path}: line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{where} is not valid JSON ({error}); {flag} needs one JSON object per line"
            ) from None

        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{where}: a lone surrogate (\\ud800 to \\udfff), which is not a character; write"
                " the file again as UTF-8"
            ) from None

        if not isinstance(record, dict):
            raise UsageError(f"{where} is not a JSON object; {flag} needs one JSON object per line")

        for other, key in other_names.items():
            if other in record:
                record.setdefault(key, record.pop(other))

        missing = next((key for key in keys if key not in record), None)
        if missing is not None:
            raise UsageError(
                f"{where} has no '{missing}'; {flag} needs {', '.join(keys)} on each line"
            )

        check_entry(record, keys, where)
        yield where, record


def whole_number(entry: Mapping[str, Any], key: str, where: str) -> int:
    """Return a whole number of an entry, which may be written as a text; raises UsageError for
    another text.
    """
    value = entry[key]
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        raise UsageError(f"{where}: '{key}' is {json.dumps(value)[:60]}, expected a whole number")

    return int(value)


def check_optional(entry: Mapping[str, Any], keys: Mapping[str, Kind], where: str) -> None:
    """Raise UsageError if a key that an entry may lack, or have as null, is of another kind."""
    given = {key: kind for key, kind in keys.items() if entry.get(key) is not None}
    check_entry(entry, given, where)


def check_entry(entry: Any, keys: Mapping[str, Kind], where: str) -> None:
    """Raise UsageError unless an entry of a file is an object with these keys and kinds."""
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is not a JSON object")

    for key, kind in keys.items():
        if key not in entry:
            raise UsageError(f"{where} has no '{key}'")

        value = entry[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(k.__name__ for k in kinds)
            shown = json.dumps(value, ensure_ascii=False)[:60]
            raise UsageError(f"{where}: '{key}' is {shown}, expected {names}")
