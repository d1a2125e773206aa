"""Read HDF5 files of bottom-up attention: adaptive (10 to 100 regions, `pos_boxes`) and fixed
([images, 36, 2048]).

They hold no classes, so a store made from them has no region labels. Image sizes follow from
`spatial_features`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from megatron_interbert.data.hdf5 import HDF5_ERRORS, Hdf5File, system_reason
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.pickles.reading import MAX_PICKLE, loads
from megatron_interbert.preparation.building.sources.base import Dropped, Record, SourceFacts
from megatron_interbert.preparation.building.sources.fields import (
    BadRecord,
    ReadOptions,
    make_regions,
)
from megatron_interbert.reading import read_text

MEND = "download the file again, or convert it to one that holds all its data itself"


class Hdf5Source:
    """Read one HDF5 file; `image_ids` is a file that names the images if the HDF5 file does not
    (see read_image_ids).
    """

    def __init__(self, path: str, options: ReadOptions, image_ids: str = "") -> None:
        self.path = path
        self.options = options

        with Hdf5File(path, MEND) as file:
            self._check(file)
            self.ids = (
                read_image_ids(image_ids, self.images, options.trust_pickle)
                if image_ids
                else self._own_ids(file)
            )

    def _check(self, file: Hdf5File) -> None:
        for name in ("image_features", "image_bb"):
            if name not in file:
                raise UsageError(
                    f"{self.path}: dataset '{name}' is missing, found {', '.join(file.names(20))}"
                )

        if "spatial_features" not in file and "image_sizes" not in file:
            raise UsageError(
                f"{self.path}: has neither spatial_features nor image_sizes, so the sizes of its"
                " images are unknown"
            )

        self.fixed = file["image_features"].ndim == 3
        if not self.fixed and "pos_boxes" not in file:
            raise UsageError(
                f"{self.path}: dataset 'pos_boxes' is missing, so the regions of an image are"
                " unknown"
            )

        self.images = len(file["image_features" if self.fixed else "pos_boxes"])
        self.feature_dim = file["image_features"].shape[-1]

    def _own_ids(self, file: Hdf5File) -> list[str]:
        if "image_ids" not in file:
            raise UsageError(
                f"{self.path}: has no image ids; give the file that has them with --image-ids"
                " (imgid2idx as JSON or pickle)"
            )

        dataset = file["image_ids"]
        if dataset.shape != (self.images,):
            raise UsageError(
                f"{self.path}: image_ids has shape {list(dataset.shape)}, expected the names of"
                f" {self.images} images"
            )

        if h5py.check_string_dtype(dataset.dtype):
            return file.strings("image_ids").tolist()

        return [str(value) for value in dataset[:].tolist()]

    def facts(self) -> SourceFacts:
        """Return the sizes; there are no labels."""
        return SourceFacts(self.feature_dim, self.options.num_classes, "none")

    def units(self, images_per_unit: int) -> list[list[int]]:
        """List ranges of images: [first, last + 1]."""
        return [
            [start, min(start + images_per_unit, self.images)]
            for start in range(0, self.images, images_per_unit)
        ]

    def read(self, unit: list[int]) -> Iterator[Record | Dropped]:
        """Yield the images of a range."""
        with Hdf5File(self.path, MEND) as file:
            for row in range(*unit):
                where = f"{self.path}: image {row}"
                try:
                    regions, kind = make_regions(self._fields(file, row), self.options)
                    yield Record(regions, where, labels=kind)
                except BadRecord as error:
                    yield Dropped(where, self.ids[row], error.reason, error.details)
                except UsageError:
                    raise
                except HDF5_ERRORS as error:
                    if system_reason(file.cause(error)):
                        raise  # the file may be intact: do not drop images for this

                    yield Dropped(
                        where,
                        self.ids[row],
                        "HDF5 cannot be read here",
                        f"{type(error).__name__}: {error}",
                    )

    def _fields(self, file: Hdf5File, row: int) -> dict[str, Any]:
        if self.fixed:
            at: Any = row
        else:
            start, stop = (int(v) for v in file["pos_boxes"][row])
            if not 0 <= start < stop <= len(file["image_features"]):
                raise BadRecord("pos_boxes points beyond the rows", f"{start} to {stop}")
            at = slice(start, stop)

        boxes = file["image_bb"][at]
        if "image_sizes" in file:
            width, height = (float(v) for v in file["image_sizes"][row])
        else:
            width, height = size_of_image(boxes, file["spatial_features"][at])

        return {
            "image_id": self.ids[row],
            "width": width,
            "height": height,
            "boxes": boxes,
            "features": file["image_features"][at],
        }


def size_of_image(boxes: np.ndarray, normalised: np.ndarray) -> tuple[float, float]:
    """Compute (w, h) from boxes [R, 4] in pixels and the same boxes as shares of the image
    [R, >= 4], using the largest corner because it is the most exact.
    """
    sizes = []

    for axis in (0, 1):
        largest = int(np.argmax(boxes[:, axis + 2]))
        share = float(normalised[largest, axis + 2])
        if not 0 < share <= 1.5:
            raise BadRecord("spatial_features are not shares of the image", str(share))
        sizes.append(float(np.round(boxes[largest, axis + 2] / share)))

    return sizes[0], sizes[1]


def read_image_ids(path: str, images: int, trust_pickle: bool) -> list[str]:
    """Read the image names by row: one per line, a JSON list, or id -> row as JSON or pickle
    (imgid2idx). Raises UsageError unless there is one for each of `images`.
    """
    if Path(path).suffix in (".pkl", ".pickle"):
        if not trust_pickle:
            raise UsageError(
                f"--image-ids {path}: is a pickle; give --trust-pickle to read the numbers and"
                " strings in it"
            )

        try:
            with open(path, "rb") as handle:
                value = loads(handle.read(MAX_PICKLE + 1))
        except UsageError:
            raise
        except (OSError, ValueError) as error:
            raise UsageError(f"--image-ids {path}: {error}") from error
    else:
        text = read_text(path, "--image-ids")
        try:
            value = (
                json.loads(text)
                if text.lstrip()[:1] in ("{", "[")
                else [line.strip() for line in text.splitlines() if line.strip()]
            )
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--image-ids {path}: not valid JSON ({error})") from error

    if isinstance(value, dict):
        names = [""] * images
        for name, row in value.items():
            if not isinstance(row, int) or not 0 <= row < images:
                raise UsageError(
                    f"--image-ids {path}: {name} is row {row}, expected 0 to {images - 1}"
                )

            names[row] = str(name)

        value = names

    if not isinstance(value, list):
        raise UsageError(
            f"--image-ids {path}: holds one {type(value).__name__}, expected a list of names or id"
            " -> row"
        )

    if len(value) != images or not all(str(v) for v in value):
        raise UsageError(
            f"--image-ids {path}: names {len(value)} images, expected a name for each of the"
            f" {images} images in the features"
        )

    return [str(v) for v in value]
