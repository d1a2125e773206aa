"""Reading one shard: its schema is checked when it is opened, its rows are read straight into the caller's memory."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError

# dataset -> type; one row a region
COLUMNS = {"image_features": np.float16, "image_bb": np.float32, "class_ids": np.int32, "class_probs": np.float32}
OTHERS = ("pos_boxes", "image_ids", "image_sizes", "caption_text", "caption_image")
# What h5py raises for damaged files, depending on where the damage is.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError, MemoryError)


class OpenShard:
    """One shard, opened: columns, row ranges [images, 2], image sizes [images, 2] and ids [images]."""

    def __init__(self, path: Path, entry: dict[str, Any], feature_dim: int) -> None:
        try:
            self.file = h5py.File(path, "r")
            self._check(path, entry, feature_dim)
        except UsageError:
            raise
        except HDF5_ERRORS as error:
            raise UsageError(f"{path}: cannot be read as HDF5 ({error}); restore it or rebuild") from error
        self.descriptor = os.open(path, os.O_RDONLY)
        self.starts, self.counts = self.ranges[:, 0].tolist(), (self.ranges[:, 1] - self.ranges[:, 0]).tolist()
        self.places = [(name, *_place(self.file[name], dtype)) for name, dtype in COLUMNS.items()]

    def _check(self, path: Path, entry: dict[str, Any], feature_dim: int) -> None:
        file = self.file
        for name in (*COLUMNS, *OTHERS):
            if name not in file:
                raise UsageError(f"{path}: dataset '{name}' is missing; rebuild the store with tools/build_features.py")
        rows, width = file["image_features"].shape
        if width != feature_dim:
            raise UsageError(f"{path}: image_features has {width} columns, expected feature_dim {feature_dim} of {MANIFEST}")
        found = (len(file["pos_boxes"]), rows, len(file["caption_image"]))
        expected = (entry["images"], entry["regions"], entry["captions"])
        if found != expected:
            raise UsageError(f"{path}: {found} images, regions, captions; {MANIFEST} says {expected}")
        self.label_width = file["class_ids"].shape[1]
        shapes = {name: file[name].shape for name in COLUMNS if name != "image_features"}
        wanted = {"image_bb": (rows, 4), "class_ids": (rows, self.label_width), "class_probs": (rows, self.label_width)}
        if shapes != wanted:
            raise UsageError(f"{path}: boxes and labels have shapes {shapes}, expected {wanted}; rebuild the store")
        self.ranges, self.sizes, self.ids = file["pos_boxes"][:], file["image_sizes"][:], file["image_ids"].asstr()[:]
        if len(self.ranges) and (self.ranges.max() > rows or self.ranges.min() < 0):
            raise UsageError(f"{path}: pos_boxes points beyond the {rows} rows of image_features")
        if self.sizes.shape != (len(self.ranges), 2) or len(self.ids) != len(self.ranges):
            raise UsageError(f"{path}: {len(self.ranges)} images with {self.sizes.shape} sizes and {len(self.ids)} ids; rebuild")

    def read(self, image: int, out: Sequence[np.ndarray], start: int, stop: int) -> None:
        """The first rows of an image into rows start .. stop of arrays [rows, width], one for each of COLUMNS; OSError when they
        are not there. Contiguous datasets, as we write them, are read by one `preadv` each, others through HDF5.
        """
        first, descriptor, preadv = self.starts[image], self.descriptor, os.preadv  # a few microseconds matter here
        for (name, offset, row_bytes), column in zip(self.places, out):  # noqa: B905
            rows = column[start:stop]
            if offset is None:
                self.file[name].read_direct(rows, np.s_[first : first + len(rows)])
            elif preadv(descriptor, (rows,), offset + first * row_bytes) != rows.nbytes:
                raise OSError(f"{name} ends before row {first + len(rows)}")

    def captions(self) -> list[tuple[str, str, int]]:
        """(text, language, image of this shard) of each caption."""
        texts, images = self.file["caption_text"].asstr()[:], self.file["caption_image"][:]
        languages = self.file["caption_language"].asstr()[:] if "caption_language" in self.file else [""] * len(texts)
        return [(str(t), str(tag), int(image)) for t, tag, image in zip(texts, languages, images, strict=True)]

    def close(self) -> None:
        """Give both file handles back."""
        os.close(self.descriptor)
        self.file.close()


def _place(dataset: h5py.Dataset, dtype: type) -> tuple[int | None, int]:
    """(offset in the file, bytes of a row); no offset where the dataset is not contiguous or of another type."""
    offset = dataset.id.get_offset()
    return offset if dataset.dtype == dtype else None, dataset.shape[1] * dataset.dtype.itemsize
