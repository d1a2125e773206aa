"""Read HDF5 files with one dataset for each field over all images: bottom-up attention's, adaptive
(10 to 100 regions, found by `pos_boxes` or `num_boxes`) or fixed ([images, 36, 2048]), GQA's, and
others of this form; open any HDF5 file of features.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import h5py
import numpy as np

from megatron_interbert.data.hdf5 import Hdf5File
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.sources import names
from megatron_interbert.preparation.building.sources.base import (
    NO_NAME,
    Dropped,
    FeatureSource,
)
from megatron_interbert.preparation.building.sources.fields import BadRecord, ReadOptions
from megatron_interbert.preparation.building.sources.hdf5_images import (
    MEND,
    ImagesSource,
    layout,
    read_here,
)
from megatron_interbert.preparation.building.sources.image_ids import (
    RowNames,
    names_beside,
    read_image_ids,
)
from megatron_interbert.preparation.building.sources.records import Raw, RecordSource
from megatron_interbert.preparation.building.sources.sizes import read_sizes
from megatron_interbert.preparation.building.sources.values import image_name

OF_IMAGES = ("width", "height", "image_sizes", "image_hw", "num_boxes")


def open_hdf5(path: str, options: ReadOptions, image_ids: str = "") -> FeatureSource:
    """Open the reader for the layout of a file; raise UsageError if it is unknown."""
    with Hdf5File(path, MEND) as file:
        found = layout(file)

    return ImagesSource(path, options, found) if found else Hdf5Source(path, options, image_ids)


class Hdf5Source(RecordSource):
    """Read one HDF5 file; `image_ids` is a file that names the images if the HDF5 file does not
    (see read_image_ids).

    A unit is a range of rows. Rows without a name are left out.
    """

    kind = "HDF5 with a dataset for each field"

    def __init__(self, path: str, options: ReadOptions, image_ids: str = "") -> None:
        super().__init__(path, options)

        with Hdf5File(path, MEND) as file:
            self.spelled = names.spellings_of(file.names(1000))
            if "features" not in self.spelled:
                raise UsageError(
                    f"{path}: no dataset of features, found {', '.join(file.names(20))}; expected"
                    " features and boxes of all images, or groups named by the images"
                )

            features = file[self.spelled["features"]]
            self.fixed = features.ndim == 3
            self.ends = None if self.fixed or "pos_boxes" in self.spelled else self._ends(file)
            rows = features if self.fixed else file[self._per_image(file)]
            self.images = len(rows)
            self.rows = self._names(file, image_ids)

        self.nameless = sum(not name for name in self.rows.ids)
        if self.nameless == self.images:
            raise UsageError(f"{path}: none of its {self.images} rows has a name in --image-ids")

    def _per_image(self, file: Hdf5File) -> str:
        return self.spelled.get("pos_boxes") or self.spelled["num_boxes"]

    def _ends(self, file: Hdf5File) -> np.ndarray:
        """Return the end of the rows of each image from the numbers of regions."""
        if "num_boxes" not in self.spelled:
            raise UsageError(
                f"{self.path}: dataset 'pos_boxes' is missing, so the regions of an image are"
                " unknown"
            )

        return np.cumsum(file[self.spelled["num_boxes"]][:].reshape(-1), dtype=np.int64)

    def _names(self, file: Hdf5File, image_ids: str) -> RowNames:
        """Return the names of the rows, from the given file, this one, or the one beside it."""
        trust = self.options.trust_pickle
        if image_ids:
            return read_image_ids(image_ids, self.images, trust, self.path)
        if "image_id" in self.spelled:
            return RowNames(self._own_ids(file, self.spelled["image_id"]))
        if beside := names_beside(self.path):
            return read_image_ids(beside, self.images, trust, self.path)

        raise UsageError(
            f"{self.path}: has no image ids; give the file that has them with --image-ids"
            " (imgid2idx as JSON or pickle)"
        )

    def _own_ids(self, file: Hdf5File, name: str) -> list[str]:
        dataset = file[name]
        if dataset.ndim not in (1, 2) or dataset.size != len(dataset):
            raise UsageError(
                f"{self.path}: {name} has shape {list(dataset.shape)}, expected the names of"
                f" {self.images} images"
            )
        if len(dataset) > self.images:
            raise UsageError(
                f"{self.path}: {name} names {len(dataset)} images, but there are features of"
                f" {self.images}; download or write the file again"
            )

        if h5py.check_string_dtype(dataset.dtype) and dataset.ndim == 1:
            ids = file.strings(name).tolist()
        else:
            ids = without_unwritten(dataset[:].reshape(-1))

        names_ = [image_name(value).strip("\0") for value in ids]

        return [*names_, *[""] * (self.images - len(ids))]

    @cached_property
    def sizes(self) -> Mapping[str, tuple[float, float]]:
        """Return (width, height) by image id, from the user's file or else that of the names."""
        path = self.options.image_sizes
        return read_sizes(path) if path else self.rows.sizes

    def remarks(self) -> list[str]:
        """Return a line about rows that no image is named after."""
        if not self.nameless:
            return []

        return [f"{self.path}: {self.nameless} rows without a name, of {self.images}: left out"]

    def units(self, images_per_unit: int) -> list[list[int]]:
        """List ranges of images: [first, last + 1]."""
        return [
            [start, min(start + images_per_unit, self.images)]
            for start in range(0, self.images, images_per_unit)
        ]

    def first_unit(self) -> list[int]:
        """Return all rows, the first of which are read."""
        return [0, self.images]

    def raw(self, unit: list[int]) -> Iterator[Raw | Dropped]:
        """Yield the images of a range; rows without a name are none."""
        with Hdf5File(self.path, MEND) as file:
            for row in range(*unit):
                name = self.rows.ids[row]
                if name:
                    yield read_here(file, name, f"image {row}", self._values, row)
                else:
                    yield Dropped(f"{self.path}: image {row}", "", NO_NAME)

    def _values(self, file: Hdf5File, row: int) -> dict[str, Any]:
        at: Any = row if self.fixed else slice(*self._range(file, row))
        values: dict[str, Any] = {}

        for field in names.OF_REGIONS:
            if field in self.spelled:
                values[self.spelled[field]] = file[self.spelled[field]][at]
        for field in OF_IMAGES:
            if field in self.spelled:
                values[self.spelled[field]] = file[self.spelled[field]][row]

        if row in self.rows.counts:
            values.setdefault("num_boxes", self.rows.counts[row])

        return values

    def _range(self, file: Hdf5File, row: int) -> tuple[int, int]:
        """Return the first and the last + 1 of the rows of an image."""
        if self.ends is None:
            start, stop = (int(v) for v in file[self.spelled["pos_boxes"]][row])
        else:
            start, stop = (int(self.ends[row - 1]) if row else 0, int(self.ends[row]))

        if not 0 <= start < stop <= len(file[self.spelled["features"]]):
            raise BadRecord("pos_boxes points beyond the rows", f"{start} to {stop}")

        return start, stop


def without_unwritten(ids: np.ndarray) -> list[Any]:
    """Return the names of rows without those at the end that were never written: several zeros."""
    written = np.flatnonzero(ids != 0) if ids.dtype.kind in "iuf" else np.arange(len(ids))
    end = int(written[-1]) + 1 if len(written) else 0

    return ids[: end if len(ids) - end > 1 else len(ids)].tolist()
