"""Choose and open the reader for a path."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.sources.base import FeatureSource
from megatron_interbert.preparation.building.sources.fields import ReadOptions
from megatron_interbert.preparation.building.sources.hdf5 import Hdf5Source
from megatron_interbert.preparation.building.sources.lmdb import LmdbSource
from megatron_interbert.preparation.building.sources.npz import NpzSource
from megatron_interbert.preparation.building.sources.stores import StoreSource
from megatron_interbert.preparation.building.sources.tsv import TsvSource

FORMATS = ("auto", "tsv", "lmdb", "npz", "hdf5", "store")


def guess_format(path: str) -> str:
    """Guess which of FORMATS a file or folder has, from its content; raise UsageError if none."""
    place = Path(path)
    if not place.exists():
        raise UsageError(f"{path}: no such file or folder")
    if place.is_dir():
        if (place / MANIFEST).is_file():
            return "store"
        if (place / "data.mdb").is_file():
            return "lmdb"
        if any(name.endswith(".npz") for name in os.listdir(path)):
            return "npz"

        raise UsageError(
            f"{path}: a folder with neither {MANIFEST} (region store), data.mdb (LMDB) nor .npz"
            " files; give the path of features in one of these formats"
        )

    with open(path, "rb") as handle:
        start = handle.read(4096)
    if start.startswith(b"\x89HDF"):
        return "hdf5"
    if place.suffix in (".lmdb", ".mdb") or start[16:20] == b"\xde\xc0\xef\xbe":
        return "lmdb"
    if b"\t" in start:
        return "tsv"

    raise UsageError(
        f"{path}: neither TSV, LMDB nor HDF5; name its format with --format {'|'.join(FORMATS[1:])}"
    )


def open_features(
    path: str, kind: str, options: ReadOptions, columns: Sequence[str] = (), image_ids: str = ""
) -> FeatureSource:
    """Open the reader for a path; raise UsageError if it cannot be read at all."""
    kind = guess_format(path) if kind == "auto" else kind
    if kind == "tsv":
        return TsvSource(path, options, columns)
    if kind == "hdf5":
        return Hdf5Source(path, options, image_ids)

    return {"lmdb": LmdbSource, "npz": NpzSource, "store": StoreSource}[kind](path, options)
