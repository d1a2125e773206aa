"""Define the settings of a build, and the fingerprint by which an unfinished one is resumed."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.files import json_sha256
from megatron_interbert.preparation.building.sources.base import FeatureSource

LMDB_LOCK = "lock.mdb"  # changes whenever an LMDB is read


def no_start(number: int) -> Callable[[], None]:
    """Do nothing when a worker process starts, nor when it ends."""
    return lambda: None


@dataclass
class BuildPlan:
    """Hold the settings of a build.

    `options` are any further settings that change the result: with another value of one, it is
    another build.
    """

    sources: list[FeatureSource]
    output: str
    caption_files: list[str] = field(default_factory=list)
    captions_format: str = "auto"
    split: str = ""
    only: list[str] | None = None  # image ids to keep
    detector: dict[str, Any] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    soft_labels: int = 10
    vocabulary: str = ""
    text_normalisation: str = "none"  # that of the model for which captions are tokenised
    images_per_shard: int = 1024
    strict_boxes: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    # called in each worker process, with its number, when it starts; returns what ends it
    start_worker: Callable[[int], Callable[[], None]] = no_start

    @property
    def needs_names(self) -> bool:
        """Check whether images are looked up by name: in captions or in a list of wanted ones."""
        return bool(self.caption_files) or self.only is not None

    def units(self) -> list[tuple[int, Any]]:
        """List the units of work: (number of the source, unit)."""
        return [
            (number, unit)
            for number, source in enumerate(self.sources)
            for unit in source.units(self.images_per_shard)
        ]

    def fingerprint(self, units: Sequence[Any]) -> dict[str, Any]:
        """Return what must be equal in another run for it to resume this one, ready for JSON."""
        files = {path: _identity(path)[1:] for path in self.caption_files}
        return {
            "captions": {"files": files, "format": self.captions_format, "split": self.split},
            "only": json_sha256(self.only) if self.only is not None else None,
            "detector": self.detector,
            "class_names": json_sha256(list(self.class_names)),
            "soft_labels": self.soft_labels,
            "vocabulary": json_sha256(self.vocabulary),
            "text_normalisation": self.text_normalisation,
            "images_per_shard": self.images_per_shard,
            "strict_boxes": self.strict_boxes,
            "source_files": json_sha256(
                [_identity(str(getattr(source, "path", ""))) for source in self.sources]
            ),
            "units": json_sha256(units),
            **self.options,
        }


def _identity(path: str) -> list[Any]:
    """Return what changes if a source is replaced: its path with size and mtime of a file or of a
    store's manifest, or with a hash over those of all files in any other folder.
    """
    place = Path(path) / MANIFEST if (Path(path) / MANIFEST).is_file() else Path(path)
    if not place.is_dir():
        return [path, *_size_and_time(place)] if place.exists() else [path]

    digest = hashlib.sha256()
    for folder, below, names in os.walk(place):
        below.sort()
        for name in sorted(names):
            if name != LMDB_LOCK:
                digest.update(
                    json.dumps([folder, name, *_size_and_time(Path(folder, name))]).encode()
                )

    return [path, digest.hexdigest()]


def _size_and_time(path: Path) -> tuple[int, int]:
    found = path.stat() if path.exists() else path.lstat()  # a link may be broken
    return found.st_size, found.st_mtime_ns
