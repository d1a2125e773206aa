"""Read LMDB files of ViLBERT and InterBERT: pickled dictionaries by image id, or tensorpack's rows
for pretraining (msgpack).

A tensorpack row is a list: features, class distribution, boxes, number of boxes, height, width,
image id, caption.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.captions.reading import guess_language
from megatron_interbert.preparation.building.dtype_codes import NotPlain
from megatron_interbert.preparation.building.pickles.nodes import UnsafePickle
from megatron_interbert.preparation.building.pickles.reading import is_pickle, loads
from megatron_interbert.preparation.building.plain_arrays import make_array
from megatron_interbert.preparation.building.sources.base import Dropped, Record, SourceFacts
from megatron_interbert.preparation.building.sources.fields import (
    NONE,
    BadRecord,
    ReadOptions,
    decode_array,
    make_regions,
    number,
)
from megatron_interbert.preparation.building.sources.lmdb_file import LmdbFile
from megatron_interbert.preparation.building.sources.tsv import ENCODED, SAME

ROW = ("features", "class_probs", "boxes", "num_boxes", "height", "width", "image_id", "caption")
NOT_IMAGES = (b"keys", b"__keys__", b"__len__", b"__size__")
CONTAINERS = (list, tuple, dict, set, frozenset)
MAX_ITEMS = 100_000  # of a list or dictionary in msgpack, which allocates before it reads them


class LmdbSource:
    """Read one LMDB, a folder with data.mdb or a single file.

    A unit is its first key (hex) and a number of images.
    """

    def __init__(self, path: str, options: ReadOptions) -> None:
        self.path = path
        self.options = options

        with LmdbFile(path) as file:
            first = next(
                (file.value(row) for row in file.rows() if row.key not in NOT_IMAGES), None
            )

        if first is None:
            raise UsageError(f"{path}: this LMDB holds no images")
        if is_pickle(first) and not options.trust_pickle:
            raise UsageError(
                f"{path}: its rows are pickles; give --trust-pickle to read the numbers, strings"
                " and arrays in them"
            )

    def facts(self) -> SourceFacts:
        """Return the facts, with the feature size of the first good row."""
        reasons = []

        for record in self.read(["", 100]):
            if isinstance(record, Record):
                return SourceFacts(
                    record.regions.features.shape[1],
                    self.options.num_classes,
                    record.labels or NONE,
                )

            reasons.append(f"{record.reason}{': ' if record.details else ''}{record.details}")

        raise UsageError(f"{self.path}: no good row among the first {len(reasons)} ({reasons[0]})")

    def units(self, images_per_unit: int) -> list[list[Any]]:
        """List [first key in hex, number of images] of the units, reading only keys."""
        found: list[list[Any]] = []

        with LmdbFile(self.path) as file:
            for number_, row in enumerate(row for row in file.rows() if row.key not in NOT_IMAGES):
                if number_ % images_per_unit == 0:
                    found.append([row.key.hex(), 0])
                found[-1][1] += 1

        return found

    def read(self, unit: list[Any]) -> Iterator[Record | Dropped]:
        """Yield the images of a unit, in the order of the keys."""
        start, wanted = unit
        with LmdbFile(self.path) as file:
            images = (row for row in file.rows(bytes.fromhex(start)) if row.key not in NOT_IMAGES)
            for row in itertools.islice(images, wanted):
                yield self._record(row.key, file.value(row))

    def _record(self, key: bytes, value: bytes) -> Record | Dropped:
        name = key[:80].decode("utf-8", "replace")
        where = f"{self.path}: key {name}"

        try:
            row = self._decode(value)
            fields, caption = row_fields(row, name)
            regions, kind = make_regions(fields, self.options)

            return Record(
                regions, where, [(caption, guess_language(caption))] if caption else [], labels=kind
            )
        except BadRecord as error:
            return Dropped(where, name, error.reason, error.details)
        except UnsafePickle as error:
            return Dropped(where, name, "pickle with more than data in it", str(error))
        except NotPlain as error:
            return Dropped(where, name, "array of neither numbers nor text", str(error))
        except UsageError:  # no row can be read at all: not this row's fault
            raise
        except Exception as error:  # a damaged row can raise anything while it is decoded
            return Dropped(
                where, name, "row that cannot be decoded", f"{type(error).__name__}: {error}"
            )

    def _decode(self, value: bytes) -> Any:
        """Decode a row, which is a pickle or msgpack, as its first bytes tell."""
        if is_pickle(value):
            if not self.options.trust_pickle:
                raise BadRecord("row is a pickle and --trust-pickle was not given")

            return loads(value)

        try:
            import msgpack
        except ImportError as error:
            raise UsageError(
                f"{self.path}: reading its rows needs the package msgpack; pip install msgpack"
            ) from error

        return msgpack.unpackb(
            value,
            raw=False,
            strict_map_key=False,
            object_hook=_numpy_of_msgpack,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
        )


def _numpy_of_msgpack(value: dict[Any, Any]) -> Any:
    """Build the array or scalar of a msgpack-numpy dictionary; return other dictionaries with text
    keys.

    Raises NotPlain or ValueError for anything except a plain array.
    """
    plain = {k.decode() if isinstance(k, bytes) else k: v for k, v in value.items()}
    if "nd" not in plain:
        return plain

    code = plain["type"]
    if isinstance(code, bytes):
        code = code.decode()

    if plain["nd"]:
        return make_array(code, plain["shape"], plain["data"])

    return make_array(code, (1,), plain["data"])[0]


def row_fields(row: Any, key: str) -> tuple[dict[str, Any], str]:
    """Return the fields for `make_regions` and the caption ("" if none) of either kind of row;
    raise BadRecord if it is malformed.
    """
    if isinstance(row, list | tuple):
        if len(row) != len(ROW):
            raise BadRecord(
                "row of an unknown kind", f"a list of {len(row)}, expected {', '.join(ROW)}"
            )

        raw = dict(zip(ROW, row, strict=True))
    elif isinstance(row, dict):
        raw = {SAME.get(name, name): value for name, value in row.items()}
    else:
        raise BadRecord(
            "row of an unknown kind", f"a {type(row).__name__}, expected a dictionary or a list"
        )

    raw.setdefault("image_id", key)
    missing = [
        name for name in ("width", "height", "num_boxes", "boxes", "features") if name not in raw
    ]
    if missing:
        raise BadRecord(
            f"'{missing[0]}' is missing", f"found {', '.join(map(str, sorted(raw, key=str)))[:200]}"
        )

    for name in ("image_id", "width", "height", "num_boxes"):
        if isinstance(raw[name], CONTAINERS):  # NumPy would make one array of it, of any size
            raise BadRecord(f"{name} is not a single value", f"a {type(raw[name]).__name__}")

    rows = int(number(raw, "num_boxes"))
    fields = {name: raw[name] for name in ("image_id", "width", "height")}
    if isinstance(fields["image_id"], bytes):
        fields["image_id"] = fields["image_id"].decode()
    for name, dtype in ENCODED.items():
        if raw.get(name) is not None:
            fields[name] = decode_array(_trimmed(raw[name], rows), dtype, rows, name)

    if raw.get("class_ids") is not None:
        fields["class_ids"] = decode_array(raw["class_ids"], np.int64, rows, "class_ids")

    caption = raw.get("caption") or ""

    return fields, " ".join(str(caption).replace("\0", " ").split())


def _trimmed(value: Any, rows: int) -> Any:
    """Remove the padding from an array that is padded to a fixed number of boxes."""
    return value[:rows] if isinstance(value, np.ndarray) and value.ndim == 2 else value
