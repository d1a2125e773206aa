"""Read folders with the features of each image in files of its own: npz, or npy with a companion
(X.npy and X_info.npy, as mmf writes them), also in folders below.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.pickles.nodes import UnsafePickle
from megatron_interbert.preparation.building.sources import names
from megatron_interbert.preparation.building.sources.arrays import (
    DAMAGE,
    PICKLED,
    read_npy,
    read_npz,
    shape_of_npy,
)
from megatron_interbert.preparation.building.sources.base import Dropped
from megatron_interbert.preparation.building.sources.fields import BadRecord, ReadOptions
from megatron_interbert.preparation.building.sources.foreign import arrays_without_boxes
from megatron_interbert.preparation.building.sources.records import Raw, RecordSource

INFO = "info"  # the companion with all other fields, a pickled dictionary
SHORTEST = 4  # letters of a field that names a companion: X_1_w.npy is another image


class FolderSource(RecordSource):
    """Read all files of a folder with one ending, in the order of their names; or one file.

    A unit is a list of paths relative to the folder.
    """

    def __init__(self, path: str, options: ReadOptions, ending: str) -> None:
        super().__init__(path, options)
        self.ending = ending
        self.kind = f"{ending} of each image"
        place = Path(path)
        self.folder = place if place.is_dir() else place.parent
        if place.is_dir():
            files = sorted(files_below(path, ending))
        else:
            beside = sorted(os.listdir(place.parent)) if ending == "npy" else []
            files = [place.name, *(name for name in beside if name.startswith(f"{place.stem}_"))]
        if not files:
            raise UsageError(f"{path}: holds no .{ending} files, expected one per image")

        self.companions = companions_of(files) if ending == "npy" else {}
        others = {name for found in self.companions.values() for name in found.values()}
        self.names = [name for name in files if name not in others]
        if place.is_file():
            self.names = [place.name]
        if ending == "npy" and not self.companions:
            self._check_first()

    def _check_first(self) -> None:
        """Refuse arrays of the features of many images, which have neither boxes nor names."""
        try:
            shape = shape_of_npy(self.folder / self.names[0])
        except DAMAGE:
            return  # reading will tell

        if len(shape) >= 2:
            raise UsageError(arrays_without_boxes(str(self.folder / self.names[0]), shape))

    def units(self, images_per_unit: int) -> list[list[str]]:
        """List the file names of each unit."""
        return [
            self.names[start : start + images_per_unit]
            for start in range(0, len(self.names), images_per_unit)
        ]

    def raw(self, unit: list[str]) -> Iterator[Raw | Dropped]:
        """Yield the content of some files."""
        for name in unit:
            path = self.folder / name
            stem = name.removesuffix(f".{self.ending}")
            try:
                yield Raw(self._values(name), stem, str(path))
            except BadRecord as error:
                yield Dropped(str(path), stem, error.reason, error.details)
            except UnsafePickle as error:
                yield Dropped(str(path), stem, "pickle with more than data in it", str(error))
            except UsageError:  # no pickle can be read at all: not this file's fault
                raise
            except DAMAGE as error:
                details = f"{type(error).__name__}: {error}"
                yield Dropped(str(path), stem, f"not a readable {self.ending}", details)

    def _values(self, name: str) -> dict[str, Any]:
        trust = self.options.trust_pickle
        if self.ending == "npz":
            values = read_npz(self.folder / name, trust)
        else:
            content = {"": name, **self.companions.get(name, {})}
            values = {}
            for field, file in content.items():
                value = read_npy(self.folder / file, trust)
                if value is PICKLED:
                    values[PICKLED] = file
                elif isinstance(value, dict):
                    values |= value
                else:
                    values[field or "features"] = value

        _check_pickles(values)

        return values


def files_below(folder: str, ending: str) -> Iterator[str]:
    """Yield the paths of files with an ending, relative to a folder, without hidden ones."""
    for place, _, files in os.walk(folder):
        for file in files:
            if file.endswith(f".{ending}") and not file.startswith("."):
                yield (Path(place) / file).relative_to(folder).as_posix()


def companions_of(files: list[str]) -> dict[str, dict[str, str]]:
    """Map each npy file to its companions by field: X.npy to {"info": X_info.npy} or
    {"bbox": X_bbox.npy}.
    """
    there = set(files)
    found: dict[str, dict[str, str]] = {}

    for file in files:
        stem = file.removesuffix(".npy")
        for field in _ends(stem):
            main = f"{stem.removesuffix(f'_{field}')}.npy"
            if main in there:
                found.setdefault(main, {})[field] = file
                break

    return found


def _ends(stem: str) -> list[str]:
    """List the ends of a name, behind an underscore, that are the name of a field."""
    parts = stem.split("_")[1:]
    ends = ["_".join(parts[start:]) for start in range(len(parts))]

    return [end for end in ends if len(end) >= SHORTEST and (end == INFO or names.ours(end))]


def _check_pickles(values: dict[str, Any]) -> None:
    """Raise BadRecord if a field that is needed, or classes, may be in a pickle that was not
    read.
    """
    if PICKLED not in values:
        return

    there = {names.ours(name) for name in values}
    where = f"pickled: {values[PICKLED]}"
    if not {"boxes", "shares"} & there or "features" not in there:
        raise BadRecord("its fields are in a pickle and --trust-pickle was not given", where)
    if not {"class_ids", "class_probs"} & there:
        raise BadRecord("its classes may be in a pickle and --trust-pickle was not given", where)
