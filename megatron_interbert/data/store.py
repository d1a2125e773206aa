"""Reading a region store: HDF5 shards and manifest.json (contract: docs/region_store.md).

Sizes and schema are checked when a store or a shard is opened, hashes on demand, records when they are read.
"""

import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from megatron_interbert.config import read_json
from megatron_interbert.errors import UsageError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CAPTIONS = "captions.h5"
VOCABULARY = "vocab.txt"
HARD_NEGATIVES = "hard_negatives.npy"
MAX_OPEN_SHARDS = 64
BOXES_AND_LABELS = {"image_features": np.float16, "image_bb": np.float32, "class_ids": np.int32, "class_probs": np.float32}


@dataclass
class Regions:
    """One image: features [R, F] float16, boxes [R, 4] pixels x1 y1 x2 y2, size (w, h), soft labels [R, k]."""

    image_id: str
    size: tuple[float, float]
    features: np.ndarray
    boxes: np.ndarray
    class_ids: np.ndarray
    class_probs: np.ndarray


def repair_boxes(boxes: np.ndarray, size: tuple[float, float]) -> tuple[np.ndarray, int]:
    """Boxes [R, 4] sorted and clipped into the image, and how many of them were not so before."""
    fixed = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    np.clip(fixed, 0, np.array([*size, *size], dtype=fixed.dtype), out=fixed)
    return fixed, int((fixed != boxes).any(axis=1).sum())


def record_problem(regions: Regions, num_classes: int) -> str | None:
    """What makes a record unusable, or None. Boxes outside the image are not a problem here: they can be repaired."""
    if has_non_finite(regions.features):
        return "features hold NaN or infinity, or values beyond float16; extract it again or drop it"
    if not np.isfinite(regions.boxes).all():
        return "boxes hold NaN or infinity; extract it again or drop it"
    if not (np.isfinite(regions.size).all() and min(regions.size) > 0):
        return f"image size is {regions.size}, expected width and height above 0"
    low, high = regions.class_ids.min(), regions.class_ids.max()
    if low < 0 or high >= num_classes:
        return f"class ids {low} to {high}, expected 0 to {num_classes - 1}"
    if not ((regions.class_probs >= 0).all() and (regions.class_probs.sum(axis=1) <= 1.001).all()):
        return "class_probs are no probabilities (negative, NaN, or more than 1 in sum)"
    return None


def has_non_finite(features: np.ndarray) -> bool:
    """Whether a float16 array holds NaN or infinity (by exponent bits: five times faster than np.isfinite)."""
    return bool(((features.view(np.uint16) & 0x7C00) == 0x7C00).any())


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class Column:
    """Rows of one dataset. Contiguous datasets, as we write them, are read by one `pread`; others through HDF5."""

    def __init__(self, descriptor: int, dataset: h5py.Dataset) -> None:
        self.descriptor, self.dataset = descriptor, dataset
        self.offset, self.dtype, self.width = dataset.id.get_offset(), dataset.dtype, dataset.shape[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop-1 as [stop - start, width]."""
        if self.offset is None:
            return self.dataset[start:stop]
        row = self.width * self.dtype.itemsize
        data = os.pread(self.descriptor, (stop - start) * row, self.offset + start * row)
        if len(data) != (stop - start) * row:
            raise OSError(f"only {len(data)} of {(stop - start) * row} bytes")
        return np.frombuffer(data, self.dtype).reshape(stop - start, self.width)


class OpenShard:
    """One shard, opened and its schema checked: columns, row ranges, image sizes and ids."""

    def __init__(self, path: Path, shard: dict[str, Any], feature_dim: int) -> None:
        try:
            self.file = h5py.File(path, "r")
        except OSError as error:
            raise UsageError(f"{path}: cannot be read as HDF5 ({error}); restore it or rebuild") from error
        file = self.file
        for name in (*BOXES_AND_LABELS, "pos_boxes", "image_ids", "image_sizes", "caption_text", "caption_image"):
            if name not in file:
                raise UsageError(f"{path}: dataset '{name}' is missing; rebuild the store with tools/build_features.py")
        rows, width = file["image_features"].shape
        if width != feature_dim:
            raise UsageError(f"{path}: image_features has {width} columns, expected feature_dim {feature_dim} of {MANIFEST}")
        found = (len(file["pos_boxes"]), rows, len(file["caption_image"]))
        expected = (shard["images"], shard["regions"], shard["captions"])
        if found != expected:
            raise UsageError(f"{path}: {found} images, regions, captions; {MANIFEST} says {expected}")
        self.ranges, self.sizes, self.ids = file["pos_boxes"][:], file["image_sizes"][:], file["image_ids"].asstr()[:]
        if len(self.ranges) and (self.ranges.max() > rows or self.ranges.min() < 0):
            raise UsageError(f"{path}: pos_boxes points beyond the {rows} rows of image_features")
        self.descriptor = os.open(path, os.O_RDONLY)
        self.columns = {name: Column(self.descriptor, file[name]) for name in BOXES_AND_LABELS}

    def close(self) -> None:
        """Give both file handles back."""
        os.close(self.descriptor)
        self.file.close()


class RegionStore:
    """Random access to images and captions of a store. Cheap to pickle: files are opened by the process that reads."""

    def __init__(self, path: str, strict_boxes: bool = False) -> None:
        self.path = Path(path)
        self.strict_boxes = strict_boxes
        self.repaired_boxes = 0  # boxes that this process has clipped while reading
        if not (self.path / MANIFEST).is_file():
            raise UsageError(
                f"--data-path {path}: no {MANIFEST} there, expected a region store;"
                " make one with tools/build_features.py or tools/make_sample.py"
            )
        self.manifest = read_json(self.path / MANIFEST, "region store")
        version = self.manifest.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{self.path / MANIFEST}: schema_version {version}, this version reads {SCHEMA_VERSION};"
                " rebuild the store with tools/build_features.py"
            )
        self.feature_dim: int = self.manifest["feature_dim"]
        self.num_classes: int = self.manifest["num_classes"]
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        self.num_images = sum(s["images"] for s in self.shards)
        self._first_image = np.cumsum([0] + [s["images"] for s in self.shards])
        for shard in self.shards:
            self._check_file(shard)
        self._check_file(self.manifest["captions_file"])
        self._forget_handles()
        self.caption_image = self._read_caption_images()
        self.num_captions = len(self.caption_image)

    def _forget_handles(self) -> None:
        self._pid = os.getpid()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._text: np.ndarray | None = None
        self._offsets: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("_open", "_text", "_offsets"):
            state.pop(name)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_handles()

    def _check_file(self, entry: dict[str, Any]) -> None:
        path = self.path / entry["file"]
        if not path.is_file():
            raise UsageError(f"{path}: missing, but listed in {MANIFEST}; restore it or rebuild the store")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UsageError(f"{path}: {size} bytes, expected {entry['bytes']} (truncated?); restore it or rebuild the store")

    def verify_hashes(self) -> None:
        """Read every file and compare its sha256 with the manifest; UsageError names the first that differs."""
        for entry in [*self.shards, self.manifest["captions_file"]]:
            if file_sha256(self.path / entry["file"]) != entry["sha256"]:
                raise UsageError(f"{self.path / entry['file']}: sha256 differs from {MANIFEST} (corrupt); restore the file")

    def _shard(self, index: int) -> OpenShard:
        if self._pid != os.getpid():  # forked: handles of the parent must not be used here
            self._forget_handles()
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        shard = OpenShard(self.path / self.shards[index]["file"], self.shards[index], self.feature_dim)
        self._open[index] = shard
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return shard

    def _open_captions(self) -> h5py.File:
        try:
            return h5py.File(self.path / CAPTIONS, "r")
        except OSError as error:
            raise UsageError(f"{self.path / CAPTIONS}: cannot be read as HDF5 ({error}); restore it or rebuild") from error

    def _read_caption_images(self) -> np.ndarray:
        with self._open_captions() as file:
            images = file["image"][:]
        bad = np.flatnonzero((images < 0) | (images >= self.num_images))
        if len(bad):
            raise UsageError(
                f"{self.path / CAPTIONS}: caption {bad[0]} belongs to image {images[bad[0]]},"
                f" but the store has images 0 to {self.num_images - 1}; rebuild the store"
            )
        return images

    def caption(self, index: int) -> str:
        """Text of a caption; the file is memory-mapped, so any process may draw from the whole corpus."""
        if self._text is None or self._pid != os.getpid():
            if self._pid != os.getpid():
                self._forget_handles()
            with self._open_captions() as file:
                self._text, self._offsets = _map(self.path / CAPTIONS, file["text"]), _map(self.path / CAPTIONS, file["offsets"])
        return bytes(self._text[self._offsets[index] : self._offsets[index + 1]]).decode("utf-8")

    def hard_negatives(self) -> np.ndarray | None:
        """int32 [captions, K] of caption indexes, -1 where there are fewer, or None when none were mined."""
        path = self.path / HARD_NEGATIVES
        if not path.is_file():
            return None
        table = np.load(path, mmap_mode="r", allow_pickle=False)
        if table.ndim != 2 or len(table) != self.num_captions or table.max(initial=-1) >= self.num_captions:
            raise UsageError(
                f"{path}: shape {table.shape}, largest index {table.max(initial=-1)}; expected one row for each of"
                f" {self.num_captions} captions and indexes below that; mine it again"
            )
        return table

    def languages(self) -> np.ndarray:
        """Language tag of each caption, array of str [captions]; empty string where unknown."""
        with self._open_captions() as file:
            names = [n.decode() if isinstance(n, bytes) else n for n in file.attrs["languages"]]
            return np.array(names, dtype=object)[file["language"][:]]

    def image_id(self, index: int) -> str:
        """The name of an image (file stem or the like) by its number in the store."""
        shard, row = self._locate(index)
        return self._shard(shard).ids[row]

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first_image, index, side="right")) - 1
        return shard, index - int(self._first_image[shard])

    def read(self, index: int, max_regions: int | None = None) -> Regions:
        """Regions of one image, the first `max_regions` as stored. UsageError names file and image of a bad record."""
        number, row = self._locate(index)
        shard = self._shard(number)
        start, stop = (int(v) for v in shard.ranges[row])
        stop = stop if max_regions is None else min(stop, start + max_regions)
        where = f"{self.path / self.shards[number]['file']}: image {row}"
        if stop <= start:
            raise UsageError(f"{where} has no regions; rebuild the store without it")
        try:
            arrays = {name: column.read(start, stop) for name, column in shard.columns.items()}
        except OSError as error:
            raise UsageError(f"{where} cannot be read ({error}); restore the shard") from error
        size = (float(shard.sizes[row, 0]), float(shard.sizes[row, 1]))
        labels = (arrays["class_ids"], arrays["class_probs"])
        regions = Regions(shard.ids[row], size, arrays["image_features"], arrays["image_bb"], *labels)
        problem = record_problem(regions, self.num_classes)
        if problem:
            raise UsageError(f"{where} ({regions.image_id}): {problem}")
        regions.boxes, repaired = repair_boxes(regions.boxes, size)
        if repaired and self.strict_boxes:
            raise UsageError(
                f"{where} ({regions.image_id}): {repaired} boxes outside the image or inverted; drop --strict-boxes to clip them"
            )
        self.repaired_boxes += repaired
        return regions


def _map(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    """A contiguous HDF5 dataset as a read-only memory map."""
    if dataset.size == 0:
        return np.zeros(dataset.shape, dataset.dtype)
    return np.memmap(path, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)
