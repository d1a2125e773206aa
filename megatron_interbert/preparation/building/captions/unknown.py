"""Find by looking what the fields of records hold whose names are unknown."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.captions.columns import name_columns
from megatron_interbert.preparation.building.captions.fields import read_record
from megatron_interbert.preparation.building.captions.texts import is_nothing

LOOKED_AT = 200  # records by which fields are judged


def unknown_fields(records: Sequence[Mapping[Any, Any]]) -> dict[Any, str]:
    """Find the fields that hold captions and images, where no known field does: field ->
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
    rows = [[_cell(record.get(name, "")) for name in names] for record in records]
    try:
        columns = name_columns(rows, needed, [str(name) for name in names])
    except UsageError:  # several fields may name the image
        return {}

    meaning = {name: field for name, field in zip(names, columns, strict=False) if field}
    completed = [read_record(with_known_names(record, meaning)) for record in records]
    enough = any(record.texts and (record.images or record.address) for record in completed)

    return meaning if enough else {}


def _cell(value: Any) -> str:
    """Return a value as a cell of a table: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def with_known_names(record: Any, meaning: Mapping[Any, str]) -> Any:
    """Return a record with what its fields of unknown names hold under names that are known."""
    if not isinstance(record, Mapping):
        return record

    known = {field: record[name] for name, field in meaning.items() if name in record}
    own = {name: value for name, value in record.items() if not is_nothing(value)}

    return {**known, **own}


def in_words(meaning: Mapping[Any, str]) -> str:
    """Say which fields are read as what."""
    return ", ".join(f"{name!r} read as {field}" for name, field in meaning.items())


def names_of_fields(records: Iterable[Any]) -> str:
    """Return the names of some fields of records, for messages; "" if there are none."""
    names = dict.fromkeys(
        name for record in records if isinstance(record, Mapping) for name in record
    )
    return ", ".join(map(repr, list(names)[:8]))
