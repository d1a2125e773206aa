"""Read one shard: check its schema when it is opened, and read its rows straight into the caller's
memory.
"""

import contextlib
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from megatron_interbert.data.hdf5 import Hdf5File, reading_problem
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError

# dataset -> type; one row per region
COLUMNS = {
    "image_features": np.float16,
    "image_bb": np.float32,
    "class_ids": np.int32,
    "class_probs": np.float32,
}
# in stores with attributes
ATTRIBUTES = {"attribute_ids": np.int32, "attribute_probs": np.float32}
OTHERS = ("pos_boxes", "image_ids", "image_sizes", "caption_text", "caption_image")
CLOSED = -1  # the descriptor of a closed shard


class OpenShard:
    """Represent one shard: row ranges [images, 2], image sizes [images, 2] and the places of its
    columns, which are kept when its file is closed, so that reopening it costs microseconds.

    `label_width`: entries of a soft label, if the manifest gives them. `attributes`: whether its
    regions have some.
    """

    def __init__(
        self,
        path: Path,
        entry: dict[str, Any],
        feature_dim: int,
        label_width: int | None = None,
        attributes: bool = False,
    ) -> None:
        self.path = path
        self.descriptor = CLOSED
        self.file = None
        self.expected = (entry, feature_dim, label_width)
        self.columns = COLUMNS | (ATTRIBUTES if attributes else {})
        self.identity: tuple[int, ...] = ()  # of the file that _learn has read
        self.open()

    def hdf5(self) -> Hdf5File:
        """Open the file with HDF5; as a context manager it turns errors into one-line ones."""
        return Hdf5File(self.path)

    def open(self) -> None:
        """Open the file, and check it if it is not the one seen before.

        Rows are then read from the very file that was checked. It stays open in HDF5 only if a
        column must be read through HDF5.
        """
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(Hdf5File(self.path))
            if file.bytes.identity != self.identity:
                self._learn(file)

            if any(offset is None for _, offset, _ in self.places):
                stack.pop_all()
                self.file = file
                self.descriptor = file.bytes.descriptor
            else:
                self.descriptor = file.keep_descriptor()

    def _learn(self, file: Hdf5File) -> None:
        """Check the schema, and keep what reading rows needs."""
        entry, feature_dim, label_width = self.expected
        self._check(file, entry, feature_dim)

        if label_width is not None and self.label_width != label_width:
            raise UsageError(
                f"{self.path}: soft labels with {self.label_width} entries, {MANIFEST} says"
                f" {label_width}; rebuild the store"
            )

        self.places = [(name, *_place(file[name], dtype)) for name, dtype in self.columns.items()]
        self.starts = self.ranges[:, 0]
        self.counts = self.ranges[:, 1] - self.starts
        self.identity = file.bytes.identity
        self.__dict__.pop("ids", None)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """Return the names of the images, read on first use: training needs none."""
        with self.hdf5() as file:
            return file.strings("image_ids")

    def _check(self, file: Hdf5File, entry: dict[str, Any], feature_dim: int) -> None:
        self._check_datasets(file)
        self._check_counts(file, entry, feature_dim)
        self._check_labels(file)
        self._check_images(file)

    def _check_datasets(self, file: Hdf5File) -> None:
        for name in (*self.columns, *OTHERS):
            if name not in file:
                raise UsageError(
                    f"{self.path}: dataset '{name}' is missing; rebuild the store with"
                    " interbert build-features"
                )

        for name in (*self.columns, "pos_boxes", "image_sizes"):
            if file[name].ndim != 2:
                raise UsageError(
                    f"{self.path}: {name} has shape {file[name].shape}, expected rows and columns;"
                    " rebuild the store"
                )

    def _check_counts(self, file: Hdf5File, entry: dict[str, Any], feature_dim: int) -> None:
        rows, width = file["image_features"].shape
        if width != feature_dim:
            raise UsageError(
                f"{self.path}: image_features has {width} columns, expected feature_dim"
                f" {feature_dim} of {MANIFEST}"
            )

        found = (len(file["pos_boxes"]), rows, len(file["caption_image"]))
        expected = (entry["images"], entry["regions"], entry["captions"])
        if found != expected:
            raise UsageError(
                f"{self.path}: {found} images, regions, captions; {MANIFEST} says {expected}"
            )

    def _check_labels(self, file: Hdf5File) -> None:
        rows = len(file["image_features"])
        self.label_width = file["class_ids"].shape[1]
        shapes = {name: file[name].shape for name in self.columns if name != "image_features"}
        wanted = {
            "image_bb": (rows, 4),
            "class_ids": (rows, self.label_width),
            "class_probs": (rows, self.label_width),
            **{name: (rows, 1) for name in self.columns if name in ATTRIBUTES},
        }
        if shapes != wanted:
            raise UsageError(
                f"{self.path}: boxes and labels have shapes {shapes}, expected {wanted}; rebuild"
                " the store"
            )

    def _check_images(self, file: Hdf5File) -> None:
        path = self.path
        ranges = file["pos_boxes"]
        if ranges.shape[1] != 2 or ranges.dtype.kind not in "iu":
            raise UsageError(
                f"{path}: pos_boxes is {_described(ranges)}, expected two row numbers per image;"
                " rebuild the store"
            )

        sizes = file["image_sizes"]
        if sizes.dtype.kind not in "iuf":
            raise UsageError(
                f"{path}: image_sizes is {_described(sizes)}, expected width and height; rebuild"
                " the store"
            )

        rows = len(file["image_features"])
        self.ranges = ranges.astype(np.int64)[:]
        self.sizes = sizes[:]
        if len(self.ranges) and (self.ranges.max() > rows or self.ranges.min() < 0):
            raise UsageError(f"{path}: pos_boxes points beyond the {rows} rows of image_features")
        if self.sizes.shape != (len(self.ranges), 2) or len(file["image_ids"]) != len(self.ranges):
            raise UsageError(
                f"{path}: {len(self.ranges)} images with {self.sizes.shape} sizes,"
                f" {len(file['image_ids'])} ids; rebuild the store"
            )

    def read(self, image: int, out: Sequence[np.ndarray], start: int, stop: int) -> None:
        """Read the first rows of an image into rows start .. stop of arrays [rows, width], one for
        each of its columns, or the first of them; raise OSError if the file ends before them.

        Contiguous datasets, which this project writes, are read with one `preadv` each, others
        through HDF5.
        """
        # every microsecond matters here
        first = int(self.starts[image])
        descriptor = self.descriptor
        preadv = os.preadv

        # attributes, which come last, may be left out
        for (name, offset, row_bytes), column in zip(self.places, out, strict=False):
            rows = column[start:stop]
            if offset is None:
                self.file[name].read_direct(rows, np.s_[first : first + len(rows)])
            elif preadv(descriptor, (rows,), offset + first * row_bytes) != rows.nbytes:
                raise OSError(f"{name} ends before row {first + len(rows)}")

    def captions(self) -> list[tuple[str, str, int]]:
        """Return (text, language, image number in this shard) of each caption."""
        with self.hdf5() as file:
            texts = file.strings("caption_text")
            images = file["caption_image"][:]
            languages = (
                file.strings("caption_language")
                if "caption_language" in file
                else [""] * len(texts)
            )
            if not len(texts) == len(images) == len(languages):
                raise UsageError(
                    f"{self.path}: {len(texts)} texts, {len(images)} images, {len(languages)}"
                    " languages of captions, expected equal numbers; rebuild the store"
                )

        return [
            (str(t), str(tag), int(image))
            for t, tag, image in zip(texts, languages, images, strict=True)
        ]

    def close(self) -> None:
        """Close the file; what was learned about the shard is kept."""
        if self.file is not None:
            self.file.close()  # closes the descriptor too
        elif self.descriptor != CLOSED:
            os.close(self.descriptor)

        self.descriptor = CLOSED
        self.file = None

    def problem(self, where: str, error: BaseException) -> UsageError:
        """Build the one-line error for a failed `read`: damage, or a file that the system could not
        read.
        """
        if self.file is not None:
            return self.file.problem(error, where, "restore the shard", "")
        return reading_problem(where, error, "restore the shard", "")


def _described(dataset: h5py.Dataset) -> str:
    return f"{dataset.dtype} {list(dataset.shape)}"


def _place(dataset: h5py.Dataset, dtype: type) -> tuple[int | None, int]:
    """Return (offset in the file, bytes of a row); the offset is None if the dataset is not
    contiguous or not of this type.
    """
    offset = dataset.id.get_offset()
    return offset if dataset.dtype == dtype else None, dataset.shape[1] * dataset.dtype.itemsize
