"""Choose and open the reader for a path, by its content."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.sources.arrays import DAMAGE, shape_of_npy
from megatron_interbert.preparation.building.sources.base import FeatureSource
from megatron_interbert.preparation.building.sources.fields import ReadOptions
from megatron_interbert.preparation.building.sources.folders import FolderSource, files_below
from megatron_interbert.preparation.building.sources.foreign import (
    arrays_without_boxes,
    folder_without_features,
    unusable,
)
from megatron_interbert.preparation.building.sources.hdf5 import open_hdf5
from megatron_interbert.preparation.building.sources.lmdb import LmdbSource
from megatron_interbert.preparation.building.sources.stores import StoreSource
from megatron_interbert.preparation.building.sources.tsv import TsvSource, is_table

FORMATS = ("auto", "tsv", "lmdb", "npz", "npy", "hdf5", "store")
FIRST_BYTES = 1 << 16
FEW = 1000  # names that tell what a folder holds


def guess_format(path: str) -> str:
    """Guess which of FORMATS a file or folder has, from its content; raise UsageError if none."""
    place = Path(path)
    if not place.exists():
        raise UsageError(f"{path}: no such file or folder")
    if place.is_dir():
        return _of_folder(place)

    with open(path, "rb") as handle:
        start = handle.read(FIRST_BYTES)
    if start.startswith(b"\x89HDF"):
        return "hdf5"
    if place.suffix in (".lmdb", ".mdb") or start[16:20] == b"\xde\xc0\xef\xbe":
        return "lmdb"
    if start.startswith(b"\x93NUMPY"):
        return _of_array(place)
    if start.startswith(b"PK") and place.suffix == ".npz":
        return "npz"
    if what := unusable(start):
        raise UsageError(f"{path}: {what}")
    if place.suffix != ".json" and is_table(start):
        return "tsv"
    if what := unusable(start, path):
        raise UsageError(f"{path}: {what}")

    raise UsageError(
        f"{path}: neither TSV, LMDB, HDF5, npz nor npy; name its format with --format"
        f" {'|'.join(FORMATS[1:])}"
    )


def _of_folder(place: Path) -> str:
    if (place / MANIFEST).is_file():
        return "store"
    if (place / "data.mdb").is_file():
        return "lmdb"

    for kind in ("npz", "npy"):
        if next(files_below(str(place), kind), None):
            return kind

    below = (name for _, _, files in os.walk(place) for name in files)
    raise UsageError(folder_without_features(str(place), list(itertools.islice(below, FEW))))


def _of_array(place: Path) -> str:
    try:
        shape = shape_of_npy(place)
    except DAMAGE as error:
        raise UsageError(f"{place}: an npy file that cannot be read ({error})") from error
    if len(shape) >= 2 and not place.with_name(f"{place.stem}_info.npy").is_file():
        raise UsageError(arrays_without_boxes(str(place), shape))

    return "npy"


def open_features(
    path: str, kind: str, options: ReadOptions, columns: Sequence[str] = (), image_ids: str = ""
) -> FeatureSource:
    """Open the reader for a path; raise UsageError if it cannot be read at all."""
    kind = guess_format(path) if kind == "auto" else kind
    if kind == "tsv":
        return TsvSource(path, options, columns)
    if kind == "hdf5":
        return open_hdf5(path, options, image_ids)
    if kind in ("npz", "npy"):
        return FolderSource(path, options, kind)

    return {"lmdb": LmdbSource, "store": StoreSource}[kind](path, options)
