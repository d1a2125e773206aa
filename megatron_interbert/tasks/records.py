"""Files of one JSON object a line."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_text


def read_records(
    path: str, flag: str, keys: Mapping[str, type | tuple[type, ...]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read (`PATH: line N`, record) of each line that is not empty.

    UsageError for a line without one of the `keys`, or with another type.
    """
    for number, line in enumerate(read_text(path, flag).split("\n"), 1):
        if not line.strip():
            continue

        where = f"{path}: line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{where} is no JSON ({error}); {flag} is a file with one JSON object a line"
            ) from None

        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{where}: half a surrogate pair (\\ud800 to \\udfff), which is no character; write"
                " it anew as UTF-8"
            ) from None

        if not isinstance(record, dict):
            raise UsageError(
                f"{where} is no JSON object; {flag} is a file with one JSON object a line"
            )

        for key, kind in keys.items():
            if key not in record:
                raise UsageError(
                    f"{where} has no '{key}'; {flag} needs {', '.join(keys)} in each line"
                )

            if not isinstance(record[key], kind) or isinstance(record[key], bool):
                names = " or ".join(
                    k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))
                )
                raise UsageError(
                    f"{where}: '{key}' is {json.dumps(record[key], ensure_ascii=False)[:60]},"
                    f" expected {names}"
                )

        yield where, record
