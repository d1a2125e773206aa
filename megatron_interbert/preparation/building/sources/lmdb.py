"""Read LMDB files with a row for each image: pickled dictionaries (ViLBERT, InterBERT, volta, mmf),
msgpack (UNITER; tensorpack's rows for pretraining) or npz (UNITER's compressed ones).

A tensorpack row is a list: features, class distribution (not in those of Product1M), boxes, number
of boxes, height, width, image id, caption (not in all); or a dictionary.
"""

import io
import itertools
from collections.abc import Iterator
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.dtype_codes import NotPlain
from megatron_interbert.preparation.building.pickles.nodes import UnsafePickle
from megatron_interbert.preparation.building.pickles.reading import is_pickle, loads
from megatron_interbert.preparation.building.plain_arrays import make_array
from megatron_interbert.preparation.building.sources.arrays import PICKLED, read_npz
from megatron_interbert.preparation.building.sources.base import Dropped
from megatron_interbert.preparation.building.sources.fields import BadRecord, ReadOptions
from megatron_interbert.preparation.building.sources.foreign import unusable
from megatron_interbert.preparation.building.sources.lmdb_file import LmdbFile
from megatron_interbert.preparation.building.sources.records import TRIED, Raw, RecordSource

ROW = ("features", "class_probs", "boxes", "num_boxes", "height", "width", "image_id", "caption")
ROW_WITHOUT_CLASSES = tuple(name for name in ROW if name != "class_probs")
NOT_IMAGES = (b"keys", b"__keys__", b"__len__", b"__size__", b"image_ids", b"length")
ZIP = b"PK\x03\x04"
MAX_ITEMS = 100_000  # of a list or dictionary in msgpack, which allocates before it reads them


class LmdbSource(RecordSource):
    """Read one LMDB, a folder with data.mdb or a single file.

    A unit is its first key (hex) and a number of images.
    """

    def __init__(self, path: str, options: ReadOptions) -> None:
        super().__init__(path, options)
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

        self.kind = f"LMDB of {_kind_of(first)}"
        if self.kind.endswith("msgpack") and (what := unusable(first)):
            raise UsageError(f"{path}: the first of its rows is {what}")

    def first_unit(self) -> list[Any]:
        """Return the first rows, without a look at all keys."""
        return ["", TRIED]

    def units(self, images_per_unit: int) -> list[list[Any]]:
        """List [first key in hex, number of images] of the units, reading only keys."""
        found: list[list[Any]] = []

        with LmdbFile(self.path) as file:
            for number_, row in enumerate(row for row in file.rows() if row.key not in NOT_IMAGES):
                if number_ % images_per_unit == 0:
                    found.append([row.key.hex(), 0])
                found[-1][1] += 1

        return found

    def raw(self, unit: list[Any]) -> Iterator[Raw | Dropped]:
        """Yield the rows of a unit, in the order of the keys."""
        start, wanted = unit
        with LmdbFile(self.path) as file:
            images = (row for row in file.rows(bytes.fromhex(start)) if row.key not in NOT_IMAGES)
            for row in itertools.islice(images, wanted):
                yield self._row(row.key, file.value(row))

    def _row(self, key: bytes, value: bytes) -> Raw | Dropped:
        name = key.decode("utf-8", "replace")
        where = f"{self.path}: key {name[:80]}"

        try:
            return Raw(_by_name(self._decode(value)), name, where)
        except BadRecord as error:
            return Dropped(where, name, error.reason, error.details)
        except UnsafePickle as error:
            return Dropped(where, name, "pickle with more than data in it", str(error))
        except NotPlain as error:
            return Dropped(where, name, "array of neither numbers nor text", str(error))
        except UsageError:  # no row can be read at all: not this row's fault
            raise
        except Exception as error:  # a damaged row can raise anything while it is decoded
            details = f"{type(error).__name__}: {error}"
            return Dropped(where, name, "row that cannot be decoded", details)

    def _decode(self, value: bytes) -> Any:
        """Decode a row, which is a pickle, npz or msgpack, as its first bytes tell."""
        if is_pickle(value):
            if not self.options.trust_pickle:
                raise BadRecord("row is a pickle and --trust-pickle was not given")

            return loads(value)

        if value.startswith(ZIP):
            fields = read_npz(io.BytesIO(value), self.options.trust_pickle)
            fields.pop(PICKLED, None)
            return fields

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


def _kind_of(row: bytes) -> str:
    if is_pickle(row):
        return "pickles"

    return "npz" if row.startswith(ZIP) else "msgpack"


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


def _by_name(row: Any) -> dict[Any, Any]:
    """Return the fields of a row, which may be a tensorpack list; raise BadRecord for others."""
    if isinstance(row, dict):
        return row
    if not isinstance(row, list | tuple):
        raise BadRecord(
            "row of an unknown kind", f"a {type(row).__name__}, expected a dictionary or a list"
        )

    second = getattr(row[1], "shape", ()) if 1 < len(row) < len(ROW) else ()
    fields = ROW_WITHOUT_CLASSES if second[1:] == (4,) else ROW  # boxes come second
    if len(fields) - len(row) not in (0, 1):
        raise BadRecord(
            "row of an unknown kind", f"a list of {len(row)}, expected {', '.join(ROW)}"
        )

    return dict(zip(fields, row, strict=False))
