"""Read TSV files with base64 columns: LXMERT's 10, bottom-up-attention's 6, or those that the
caller names.

A unit is a range of bytes; its records are the lines that begin in it, so planning reads only the
first few lines.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.sources.base import Dropped, Record, SourceFacts
from megatron_interbert.preparation.building.sources.fields import (
    NONE,
    BadRecord,
    ReadOptions,
    decode_array,
    make_regions,
    number,
)

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
BY_COUNT = {
    len(BOTTOM_UP): BOTTOM_UP,
    len(BOTTOM_UP) + 1: (*BOTTOM_UP, "cls_prob"),
    len(LXMERT): LXMERT,
}
# other names in use -> the name here
SAME = {
    "img_id": "image_id",
    "product_id": "image_id",
    "img_w": "width",
    "image_w": "width",
    "img_h": "height",
    "image_h": "height",
    "objects_id": "class_ids",
    "class_labels": "class_ids",
    "objects_conf": "class_confidence",
    "cls_prob": "class_probs",
}
NEEDED = {"image_id", "width", "height", "num_boxes", "boxes", "features"}
ENCODED = {
    "boxes": np.float32,
    "features": np.float32,
    "class_probs": np.float32,
    "class_confidence": np.float32,
}
LONGEST_LINE = 1 << 28


class TsvSource:
    """Read one TSV file.

    `columns` names its columns if their number does not tell; columns with unknown names are
    ignored.
    """

    def __init__(self, path: str, options: ReadOptions, columns: Sequence[str] = ()) -> None:
        self.path = path
        self.options = options
        self.columns = tuple(columns)

        try:
            self.bytes = os.path.getsize(path)
            with open(path, "rb") as handle:
                first = handle.readline(LONGEST_LINE)
                # the first line may be a header
                some = [len(handle.readline(LONGEST_LINE)) for _ in range(8)]
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error})") from error

        count = first.count(b"\t") + 1
        self.columns = self.columns or BY_COUNT.get(count, ())
        names = {SAME.get(name, name) for name in self.columns}
        if not self.columns or len(self.columns) != count or not names >= NEEDED:
            raise UsageError(
                f"{path}: {count} columns in the first line, expected"
                f" {', '.join(map(str, BY_COUNT))}, or as many as --columns names"
                f" ({', '.join(sorted(NEEDED))} among them)"
            )

        self.line_bytes = (
            max(sum(some) // max(sum(length > 0 for length in some), 1), 1)
            if any(some)
            else max(len(first), 1)
        )

    def facts(self) -> SourceFacts:
        """Return the facts, with the feature size of the first good line."""
        reasons = []

        for number_, record in enumerate(self.read([0, self.bytes])):
            if isinstance(record, Record):
                return SourceFacts(
                    record.regions.features.shape[1],
                    self.options.num_classes,
                    record.labels or NONE,
                )

            reasons.append(f"{record.reason}{': ' if record.details else ''}{record.details}")
            if number_ == 99:
                break

        raise UsageError(
            f"{self.path}: no good record among the first lines"
            f" ({reasons[0] if reasons else 'the file is empty'})"
        )

    def units(self, images_per_unit: int) -> list[list[int]]:
        """List ranges of bytes: [start, stop]."""
        step = self.line_bytes * images_per_unit
        return [[start, min(start + step, self.bytes)] for start in range(0, self.bytes, step)]

    def read(self, unit: list[int]) -> Iterator[Record | Dropped]:
        """Yield the images of the lines that begin in the range."""
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

                found = self._record(line.rstrip(b"\r\n"), f"{self.path}: line at byte {place}")
                if found:
                    yield found

    def _record(self, line: bytes, where: str) -> Record | Dropped | None:
        values = line.split(b"\t")
        if [v.decode("utf-8", "replace") for v in values if len(v) < 40] == list(self.columns):
            return None  # a header

        image_id = (
            values[self._id_column][:80].decode("utf-8", "replace")
            if len(values) > self._id_column
            else ""
        )
        try:
            if len(values) != len(self.columns):
                raise BadRecord(
                    "wrong number of columns", f"{len(values)}, expected {len(self.columns)}"
                )

            regions, kind = make_regions(self._fields(values), self.options)
        except BadRecord as error:
            return Dropped(where, image_id, error.reason, error.details)
        except UnicodeDecodeError as error:
            return Dropped(where, image_id, "text is not UTF-8", str(error))

        return Record(regions, where, labels=kind)

    @property
    def _id_column(self) -> int:
        return [SAME.get(name, name) for name in self.columns].index("image_id")

    def _fields(self, values: list[bytes]) -> dict[str, Any]:
        raw = dict(zip((SAME.get(name, name) for name in self.columns), values, strict=True))
        fields: dict[str, Any] = {
            name: raw[name].decode() for name in ("image_id", "width", "height", "num_boxes")
        }
        rows = int(number(fields, "num_boxes"))
        for name, dtype in ENCODED.items():
            if name in raw:
                fields[name] = decode_array(raw[name], dtype, rows, name)

        if "class_ids" in raw:
            fields["class_ids"] = decode_array(raw["class_ids"], np.int64, rows, "class_ids")

        return fields
