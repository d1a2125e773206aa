"""Read folders of npz files, one per image, with this project's field names or those of
bottom-up-attention.pytorch (x, bbox, info).
"""

import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.dtype_codes import array_bytes
from megatron_interbert.preparation.building.pickles.nodes import UnsafePickle
from megatron_interbert.preparation.building.pickles.reading import loads
from megatron_interbert.preparation.building.plain_arrays import make_array
from megatron_interbert.preparation.building.sources.base import Dropped, Record, SourceFacts
from megatron_interbert.preparation.building.sources.fields import (
    BACKGROUND_FIRST,
    BACKGROUND_NONE,
    NONE,
    BadRecord,
    ReadOptions,
    make_regions,
)

NAMES = {
    "image_id": ("image_id",),
    "width": ("image_w", "width"),
    "height": ("image_h", "height"),
    "boxes": ("boxes", "bbox"),
    "features": ("features", "x"),
    "class_probs": ("cls_prob", "class_probs"),
    "class_confidence": ("cls_conf", "objects_conf", "class_confidence"),
}
CLASS_IDS = {
    "cls_id_1601": BACKGROUND_FIRST,
    "objects_id": BACKGROUND_NONE,
    "objects": BACKGROUND_NONE,
}
# what a damaged or foreign file can raise while it is read
DAMAGE = (
    *(
        OSError,
        ValueError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        MemoryError,
        RuntimeError,
    ),
    *(TypeError, AttributeError, IndexError, SyntaxError, tokenize.TokenError),
)
PICKLED = "a pickle that was not read"
LARGEST_IMAGE = 256 << 20  # bytes of all arrays of a file, unpacked
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those that NumPy uses


class NpzSource:
    """Read all .npz files of a folder, in the order of their names."""

    def __init__(self, path: str, options: ReadOptions) -> None:
        self.path = path
        self.options = options
        with os.scandir(path) as entries:
            self.names = sorted(entry.name for entry in entries if entry.name.endswith(".npz"))
        if not self.names:
            raise UsageError(f"{path}: holds no .npz files, expected one per image")

    def facts(self) -> SourceFacts:
        """Return the facts, with the feature size of the first good file."""
        reasons = []

        for record in self.read(self.names[:100]):
            if isinstance(record, Record):
                return SourceFacts(
                    record.regions.features.shape[1],
                    self.options.num_classes,
                    record.labels or NONE,
                )

            reasons.append(
                f"{record.where}: {record.reason}{': ' if record.details else ''}{record.details}"
            )

        raise UsageError(f"{self.path}: no good npz among the first {len(reasons)}; {reasons[0]}")

    def units(self, images_per_unit: int) -> list[list[str]]:
        """List the file names of each unit."""
        return [
            self.names[start : start + images_per_unit]
            for start in range(0, len(self.names), images_per_unit)
        ]

    def read(self, unit: list[str]) -> Iterator[Record | Dropped]:
        """Yield the images of some files."""
        for name in unit:
            path = Path(self.path) / name
            try:
                fields, scheme = self._fields(path)
                regions, kind = make_regions(fields, self.options, scheme)
                yield Record(regions, str(path), labels=kind)
            except BadRecord as error:
                yield Dropped(str(path), path.stem, error.reason, error.details)
            except UnsafePickle as error:
                yield Dropped(str(path), path.stem, "pickle with more than data in it", str(error))
            except UsageError:  # no pickle can be read at all: not this file's fault
                raise
            except DAMAGE as error:
                yield Dropped(
                    str(path),
                    path.stem,
                    "not a readable npz without pickles",
                    f"{type(error).__name__}: {error}",
                )

    def _fields(self, path: Path) -> tuple[dict[str, Any], str]:
        raw = read_npz(path, self.options.trust_pickle)
        fields = {ours: raw[name] for ours, names in NAMES.items() for name in names if name in raw}
        fields.setdefault("image_id", path.stem)
        for name in ("width", "height", "boxes", "features"):
            if name not in fields:
                raise BadRecord(f"'{name}' is missing", f"found {', '.join(sorted(raw))}")

        features = fields["features"]
        boxes = fields["boxes"]
        if features.ndim == 2 and features.shape[0] != len(boxes) == features.shape[1]:
            fields["features"] = features.T  # some publish [F, R]

        scheme = BACKGROUND_NONE
        for name, numbering in CLASS_IDS.items():
            if name in raw:
                fields["class_ids"] = raw[name]
                scheme = numbering

        if PICKLED in raw and not {"class_ids", "class_probs"} & fields.keys():
            raise BadRecord(
                "its classes may be in a pickle and --trust-pickle was not given",
                f"pickled: {raw[PICKLED]}",
            )

        return fields, scheme


def read_npz(path: Path, trust_pickle: bool) -> dict[str, Any]:
    """Read all arrays of an npz file by name.

    The entries of a pickled dictionary (`info`) are merged in if pickles are trusted; otherwise
    fields[PICKLED] is its name. Raises BadRecord for an archive that would take more memory than
    any image, and the errors of DAMAGE.
    """
    fields: dict[str, Any] = {}

    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        _check_archive(members)

        for member in members:
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as handle:
                value = _read_array(handle, member.file_size, trust_pickle)
            if value is PICKLED:
                fields[PICKLED] = name
            elif isinstance(value, dict):
                fields.update({str(key): _as_array(item) for key, item in value.items()})
            elif value is not None:
                fields[name] = _as_array(value)

    return fields


def _check_archive(members: list[zipfile.ZipInfo]) -> None:
    """Raise BadRecord for an archive that is too large or not compressed as NumPy does it.

    zipfile never unpacks more than a member's stated size.
    """
    size = sum(member.file_size for member in members)
    if size > LARGEST_IMAGE:
        raise BadRecord(
            "larger than any image's", f"{size} bytes unpacked, at most {LARGEST_IMAGE}"
        )

    for member in members:
        if member.compress_type not in COMPRESSIONS:
            kind = f"{member.filename}: method {member.compress_type}"
            raise BadRecord("compressed as NumPy does not", kind)


def _read_array(handle: IO[bytes], size: int, trust_pickle: bool) -> Any:
    """Read one member of `size` bytes: an array, or the value of its pickle (PICKLED unless pickles
    are trusted).
    """
    version = np.lib.format.read_magic(handle)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(handle)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(handle)

    if dtype.hasobject:
        value = loads(handle.read()) if trust_pickle else PICKLED
        return value.item() if isinstance(value, np.ndarray) and value.shape == () else value

    expected = array_bytes(dtype.str, shape)  # records are of type V here and refused
    if expected > size:
        ends = f"an array of {expected} bytes in {size}"
        raise BadRecord("not a readable npz without pickles", ends)

    return make_array(dtype.str, shape, handle.read(expected), "F" if fortran else "C")


def _as_array(value: Any) -> np.ndarray:
    """Convert a value to an array; a list with text, which no field needs, to an empty one.

    NumPy would give each text the width of the longest, perhaps a thousand times as much memory.
    """
    return np.empty(0, object) if _holds_text(value) else np.asarray(value)


def _holds_text(value: Any) -> bool:
    if not isinstance(value, list | tuple):
        return False

    return any(isinstance(item, str | bytes) or _holds_text(item) for item in value)
