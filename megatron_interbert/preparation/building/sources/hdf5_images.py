"""Read HDF5 files that keep each image apart: a group for each image (volta, LXMERT's as HDF5), a
group for each field (features/ID, boxes/ID), or datasets named by both (ID_features, ID_boxes, of
meshed-memory).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_interbert.data.hdf5 import HDF5_ERRORS, Hdf5File, system_reason
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.sources import names
from megatron_interbert.preparation.building.sources.base import Dropped
from megatron_interbert.preparation.building.sources.fields import BadRecord, ReadOptions
from megatron_interbert.preparation.building.sources.records import Raw, RecordSource

MEND = "download the file again, or convert it to one that holds all its data itself"
SOME = 50  # names that tell the layout
BY_IMAGE = "group for each image"
BY_FIELD = "group for each field"
BY_BOTH = "dataset for each image and field"


@dataclass
class Layout:
    """Hold how images are kept apart, their names, and for BY_FIELD and BY_BOTH the names of the
    fields.
    """

    kind: str
    images: list[str]
    fields: list[str] = field(default_factory=list)

    def paths(self, file: Hdf5File, image: str) -> dict[str, str]:
        """Map the fields of an image that are read to their places in the file."""
        if self.kind == BY_IMAGE:
            members = names.spellings_of(file.names(None, image)).values()
            return {name: f"{image}/{name}" for name in members}

        pattern = "{1}/{0}" if self.kind == BY_FIELD else "{0}_{1}"

        return {name: pattern.format(image, name) for name in self.fields}


def layout(file: Hdf5File) -> Layout | None:
    """Return the layout of a file that keeps images apart; None if it has one dataset for each
    field over all images, or anything else.
    """
    some = file.names(SOME)
    spelled = names.spellings_of(some)
    groups = [name for name in spelled.values() if file.is_group(name)]
    if "features" in spelled:
        if {"features", "boxes", "shares"} & {names.ours(n) for n in groups} > {"features"}:
            return Layout(BY_FIELD, file.names(None, spelled["features"]), groups)
        return None

    first = next((name for name in some if file.is_group(name)), "")
    if first:
        return _by_image(file, first)

    return _by_both(file)


def _by_image(file: Hdf5File, first: str) -> Layout | None:
    members = file.names(SOME, first)
    if "features" in names.spellings_of(members):
        return Layout(BY_IMAGE, [name for name in file.names(None) if file.is_group(name)])

    below = f"{first}/{members[0]}" if members else ""
    if file.is_group(below) and "features" in names.spellings_of(file.names(SOME, below)):
        splits = [name for name in file.names(None) if file.is_group(name)]
        images = [f"{split}/{name}" for split in splits for name in file.names(None, split)]
        return Layout(BY_IMAGE, images)

    return None


def _by_both(file: Hdf5File) -> Layout | None:
    """Return the layout of names such as 9_features and 9_boxes."""
    there = file.names(None)
    ends = {end for name in there[: SOME * 10] for end in _fields_at_the_end(name)}
    features = names.spellings_of(ends).get("features")
    if features is None:
        return None

    images = [n.removesuffix(f"_{features}") for n in there if n.endswith(f"_{features}")]
    return Layout(BY_BOTH, images, sorted(names.spellings_of(ends).values()))


def _fields_at_the_end(name: str) -> Iterator[str]:
    """Yield the ends of a name behind an underscore that are names of fields, the longest first."""
    parts = name.split("_")
    for start in range(1, len(parts)):
        end = "_".join(parts[start:])
        if names.ours(end):
            yield end
            return


class ImagesSource(RecordSource):
    """Read one HDF5 file in which each image is kept apart; a unit is a range of images."""

    def __init__(self, path: str, options: ReadOptions, found: Layout) -> None:
        super().__init__(path, options)
        self.layout = found
        self.kind = f"HDF5 with a {found.kind}"
        if not found.images:
            raise UsageError(f"{path}: holds no images")

    def units(self, images_per_unit: int) -> list[list[int]]:
        """List ranges of images: [first, last + 1]."""
        count = len(self.layout.images)
        return [
            [start, min(start + images_per_unit, count)]
            for start in range(0, count, images_per_unit)
        ]

    def raw(self, unit: list[int]) -> Iterator[Raw | Dropped]:
        """Yield the images of a range."""
        with Hdf5File(self.path, MEND) as file:
            for image in self.layout.images[slice(*unit)]:
                found = read_here(file, image, image, self._values, image)
                if isinstance(found, Dropped) or found.values:
                    yield found  # groups without any field are no images

    def _values(self, file: Hdf5File, image: str) -> dict[str, Any]:
        places = self.layout.paths(file, image)
        if self.layout.kind != BY_IMAGE:
            places = {name: place for name, place in places.items() if place in file}

        return {name: file[place][()] for name, place in places.items()}


def read_here(
    file: Hdf5File, image: str, where: str, values: Callable[..., dict[str, Any]], *place: Any
) -> Raw | Dropped:
    """Return one image, or why there is none; raise if the system refuses to read, or the file is
    not safe to read.
    """
    where = f"{file.path}: {where}"
    try:
        return Raw(values(file, *place), image, where)
    except BadRecord as error:
        return Dropped(where, image, error.reason, error.details)
    except UsageError:
        raise
    except HDF5_ERRORS as error:
        if system_reason(file.cause(error)):
            raise  # the file may be intact: do not drop images for this

        details = f"{type(error).__name__}: {error}"
        return Dropped(where, image, "HDF5 cannot be read here", details)
