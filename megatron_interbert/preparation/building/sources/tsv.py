"""Read TSV and CSV files with a line for each image: base64 columns (LXMERT's 10,
bottom-up-attention's 6, those of a header or that the caller names) or JSON (Oscar and VinVL).

A unit is a range of bytes; its records are the lines that begin in it, so planning reads only the
first few lines.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.sources import names
from megatron_interbert.preparation.building.sources.base import Dropped
from megatron_interbert.preparation.building.sources.fields import BadRecord, ReadOptions
from megatron_interbert.preparation.building.sources.records import Raw, RecordSource
from megatron_interbert.preparation.building.sources.sizes import read_sizes, sizes_beside
from megatron_interbert.preparation.building.sources.values import SINGLE

JSON = "json"  # a column with all other fields
BOTTOM_UP = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
LXMERT = (
    "img_id",
    "img_h",
    "img_w",
    "objects_id",
    "objects_conf",
    "attrs_id",
    "attrs_conf",
    "num_boxes",
    "boxes",
    "features",
)
# number of columns -> their names; files with others name them in a header, or the user does
BY_COUNT = {
    3: ("image_id", "num_boxes", "features"),
    len(BOTTOM_UP): BOTTOM_UP,
    len(BOTTOM_UP) + 1: (*BOTTOM_UP, "cls_prob"),  # or a caption (Product1M)
    len(LXMERT): LXMERT,
    len(LXMERT) + 3: (*LXMERT, "cls_prob", "attrs", "classes"),
}
NEEDED = {"image_id", "features"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COUNT = re.compile(rb"^(b['\"])?\d+['\"]?$")  # a number, perhaps written as bytes
BASE64 = re.compile(rb"^(b['\"])?[A-Za-z0-9+/]{40,}=*['\"]?$")
LONGEST_LINE = 1 << 28


class TsvSource(RecordSource):
    """Read one TSV file.

    `columns` names its columns if neither a header nor their number tells; columns with unknown
    names are ignored.
    """

    kind = "TSV"

    def __init__(self, path: str, options: ReadOptions, columns: Sequence[str] = ()) -> None:
        super().__init__(path, options)

        try:
            self.bytes = os.path.getsize(path)
            with open(path, "rb") as handle:
                first = handle.readline(LONGEST_LINE)
                # the first line may be a header
                some = [len(handle.readline(LONGEST_LINE)) for _ in range(8)]
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error})") from error

        self.delimiter = b"\t" if b"\t" in first or first[:1] == b"{" else b","
        values = _split(first, self.delimiter)
        self.columns = tuple(columns) or _columns_of(values)
        known = {names.ours(name) for name in self.columns}
        if len(self.columns) != len(values) or not (known >= NEEDED or JSON in self.columns):
            raise UsageError(
                f"{path}: {len(values)} columns in the first line, expected"
                f" {', '.join(map(str, BY_COUNT))}, an id and JSON, a header, or as many as"
                " --columns names (image_id, image_w, image_h, num_boxes, boxes and features among"
                " them)"
            )

        self.line_bytes = (
            max(sum(some) // max(sum(length > 0 for length in some), 1), 1)
            if any(some)
            else max(len(first), 1)
        )

    @cached_property
    def sizes(self) -> Mapping[str, tuple[float, float]]:
        """Return (width, height) by image id, from the user's file or the hw.tsv of this one."""
        if self.options.image_sizes:
            return read_sizes(self.options.image_sizes)

        beside = sizes_beside(self.path)
        try:
            return read_sizes(beside) if beside else {}
        except UsageError:  # it is another file by that name
            return {}

    def first_unit(self) -> list[int]:
        """Return the whole file, whose first lines are read."""
        return [0, self.bytes]

    def units(self, images_per_unit: int) -> list[list[int]]:
        """List ranges of bytes: [start, stop]."""
        step = self.line_bytes * images_per_unit
        return [[start, min(start + step, self.bytes)] for start in range(0, self.bytes, step)]

    def raw(self, unit: list[int]) -> Iterator[Raw | Dropped]:
        """Yield the records of the lines that begin in the range."""
        start, stop = unit

        with open(self.path, "rb", buffering=1 << 20) as handle:
            if start:
                handle.seek(start - 1)
                while (rest := handle.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass  # skip the rest of the line before; none is left if it ends at `start`

            while (place := handle.tell()) < stop:
                line = handle.readline(LONGEST_LINE)
                while (
                    not line.endswith(b"\n")
                    and len(line) == LONGEST_LINE
                    and handle.readline(LONGEST_LINE)
                ):
                    pass  # too long for a record: skip the rest of the line

                if not line.strip():
                    continue

                found = self._line(line, f"{self.path}: line at byte {place}")
                if found:
                    yield found

    def _line(self, line: bytes, where: str) -> Raw | Dropped | None:
        values = _split(line, self.delimiter)
        if _is_header(values):
            return None

        place = next((i for i, c in enumerate(self.columns) if names.ours(c) == "image_id"), 0)
        name = values[place].decode("utf-8", "replace") if len(values) > place else ""
        try:
            if len(values) != len(self.columns):
                raise BadRecord(
                    "wrong number of columns", f"{len(values)}, expected {len(self.columns)}"
                )

            return Raw(self._values(values), name, where)
        except BadRecord as error:
            return Dropped(where, name, error.reason, error.details)
        except (ValueError, RecursionError) as error:
            return Dropped(where, name, "line that cannot be decoded", str(error)[:200])

    def _values(self, values: list[bytes]) -> dict[str, Any]:
        """Return the fields of a line: base64 as bytes, all else as text or from its JSON."""
        found: dict[str, Any] = {}

        for name, value in zip(self.columns, values, strict=True):
            if name == JSON:
                content = json.loads(value)
                found |= content if isinstance(content, dict) else {"objects": content}
            else:
                single = names.ours(name) in SINGLE
                found[name] = value.decode() if single else value

        return found


def is_table(start: bytes) -> bool:
    """Tell from its first bytes whether a file is a TSV, a CSV or lines of JSON."""
    line = start.removeprefix(BYTE_ORDER_MARK).split(b"\n", 1)[0]
    if b"\t" in start or line[:2] == b'{"':
        return True

    values = _split(line, b",")
    return len(values) in BY_COUNT or _is_header(values)


def _split(line: bytes, delimiter: bytes) -> list[bytes]:
    """Return the columns of a line, without its end, a byte order mark, and quotes of CSV."""
    line = line.removeprefix(BYTE_ORDER_MARK).rstrip(b"\r\n")
    return [_without_quotes(value) for value in line.split(delimiter)]


def _without_quotes(value: bytes) -> bytes:
    if len(value) < 2 or value[:1] != b'"' or value[-1:] != b'"':
        return value

    return value[1:-1].replace(b'""', b'"')


def _is_header(values: list[bytes]) -> bool:
    """Tell whether a line has the names of its columns."""
    return {names.ours(value) for value in values if len(value) < 40} >= NEEDED


def _columns_of(values: list[bytes]) -> tuple[str, ...]:
    """Return the columns of a line: its own words if it is a header, or by their number; () if
    unknown.
    """
    if _is_header(values):
        return tuple(value.decode("utf-8", "replace") for value in values)

    if values[-1][:1] in (b"{", b"["):
        return (*("image_id", "", "", "")[: len(values) - 1], JSON)

    columns = BY_COUNT.get(len(values), ())
    if columns[-1:] == ("cls_prob",) and not BASE64.match(values[-1]):
        columns = (*columns[:-1], "caption")
    if columns and not COUNT.match(values[columns.index("num_boxes")].strip()):
        return ()  # a header of unknown names, or something else

    return columns
