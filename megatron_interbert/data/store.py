"""Read a region store: HDF5 shards and manifest.json (contract: docs/region_store.md).

Sizes and schema are checked when a store or a shard is opened, records when they are read, hashes
on demand.
"""

import bisect
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.data.caption_file import CaptionFile
from megatron_interbert.data.hdf5 import HDF5_ERRORS, reading_problem
from megatron_interbert.data.manifest import (
    CAPTIONS,
    HARD_IMAGES,
    HARD_NEGATIVES,
    MANIFEST,
    files_of,
    how_to_mend,
    read_manifest,
    sha256_of,
)
from megatron_interbert.data.neighbours import NoTable, read_neighbours
from megatron_interbert.data.regions import Regions, has_non_finite, record_problem, repair_boxes
from megatron_interbert.data.shard_file import ATTRIBUTES, OpenShard
from megatron_interbert.errors import UsageError

MAX_OPEN_SHARDS = 64


class RegionStore:
    """Provide random access to the images and captions of a store.

    Cheap to pickle: each process opens the files itself.
    """

    def __init__(self, path: str, strict_boxes: bool = False) -> None:
        self.path = Path(path)
        self.strict_boxes = strict_boxes
        self.repaired_boxes = 0  # boxes that this process has clipped while reading
        self.manifest = read_manifest(self.path)
        self.feature_dim: int = self.manifest["feature_dim"]
        self.num_classes: int = self.manifest["num_classes"]
        self.num_attributes: int = self.manifest.get("num_attributes", 0)
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        self.num_images = sum(s["images"] for s in self.shards)
        self._first_image = list(
            itertools.accumulate((s["images"] for s in self.shards), initial=0)
        )
        self._forget_handles()
        self.captions = CaptionFile(self.path)
        self.caption_image = np.array(self.captions.image)
        self.num_captions = len(self.captions)
        self._check_caption_images()

    def _forget_handles(self) -> None:
        self._pid = os.getpid()
        # opening a shard may close one that another thread reads
        self._lock = threading.RLock()
        self._known: dict[int, OpenShard] = {}  # every shard seen so far, about 20 kB each
        self._open: OrderedDict[int, OpenShard] = OrderedDict()  # those of them with open files

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_open", "_known", "_lock")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_handles()

    def _check_caption_images(self) -> None:
        images = self.caption_image
        bad = np.flatnonzero((images < 0) | (images >= self.num_images))
        if len(bad):
            raise UsageError(
                f"{self.path / CAPTIONS}: caption {bad[0]} belongs to image {images[bad[0]]},"
                f" but the store has images 0 to {self.num_images - 1}; rebuild the store"
            )

    def verify_hashes(self) -> None:
        """Read every file and compare its sha256 with the manifest.

        Raises UsageError naming the first file that differs.
        """
        for entry in files_of(self.manifest):
            if sha256_of(self.path, entry) != entry["sha256"]:
                raise UsageError(
                    f"{self.path / entry['file']}: sha256 differs from {MANIFEST} (corrupt);"
                    f" {how_to_mend(entry)}"
                )

    def open_shard(self, index: int) -> OpenShard:
        """Return a shard by its number, open; at most MAX_OPEN_SHARDS stay open in a process."""
        self.forget_foreign_handles()
        with self._lock:
            return self._opened(index)

    def _opened(self, index: int) -> OpenShard:
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]

        shard = self._known.get(index)
        if shard is None:
            entry = self.shards[index]
            shard = OpenShard(
                self.path / entry["file"],
                entry,
                self.feature_dim,
                self.manifest.get("label_width"),
                attributes=self.num_attributes > 0,
            )
            self._known[index] = shard
        else:
            shard.open()

        self._open[index] = shard
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()

        return shard

    def forget_foreign_handles(self) -> None:
        """Drop handles inherited through a fork, which only the parent may use."""
        if self._pid != os.getpid():
            self._forget_handles()

    def caption(self, index: int) -> str:
        """Return the text of a caption."""
        return self.captions[index]

    def hard_negatives(self) -> np.ndarray | None:
        """Map the table of mined negatives: caption numbers, int32 [captions, K], padded with -1;
        None if none were mined.
        """
        return self._neighbours(
            HARD_NEGATIVES, self.num_captions, "captions", "interbert mine-negatives"
        )

    def hard_images(self) -> np.ndarray | None:
        """Map the table of mined neighbours: image numbers, int32 [images, K], nearest first,
        padded with -1; None if none were mined.
        """
        return self._neighbours(HARD_IMAGES, self.num_images, "images", "interbert mine-neighbours")

    def _neighbours(self, file: str, count: int, what: str, tool: str) -> np.ndarray | None:
        path = self.path / file
        if not path.is_file():
            return None
        try:
            return read_neighbours(path, count, count)
        except (OSError, NoTable) as error:
            raise reading_problem(
                path,
                error,
                f"expected one row for each of {count} {what}; mine it again with {tool}",
                "",
            ) from error

    def languages(self) -> np.ndarray:
        """Return the language tag of each caption, an object array of str [captions]; an empty
        string if unknown.
        """
        return self.captions.languages()

    def region_counts(self) -> np.ndarray:
        """Return the number of regions of each image, int32 [images]."""
        known = self.captions.image_regions()
        if known is not None and len(known) == self.num_images:
            return known

        parts = [
            np.diff(self.open_shard(index).ranges, axis=1)[:, 0]
            for index in range(len(self.shards))
        ]

        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    def image_id(self, index: int) -> str:
        """Return the name of an image (its file stem or similar) by its number in the store."""
        shard, row = self.locate(index)
        return self.open_shard(shard).ids[row]

    def locate(self, index: int) -> tuple[int, int]:
        """Return the shard of an image, and its number in that shard."""
        shard = bisect.bisect_right(self._first_image, index) - 1
        return shard, index - self._first_image[shard]

    def read_batch(
        self,
        images: np.ndarray,
        starts: Sequence[int],
        stops: Sequence[int],
        out: Sequence[np.ndarray],
    ) -> np.ndarray:
        """Read the first regions of some images [B] straight into rows starts[i] .. stops[i] of
        arrays, one for each column of a shard, perhaps without attributes; return the image sizes
        (w, h), float32 [B, 2].

        Only features are checked here; the caller checks the rest, and `read` names what is wrong.
        """
        numbers = np.searchsorted(self._first_image, images, side="right") - 1
        rows = (images - np.array(self._first_image)[numbers]).tolist()
        sizes = np.empty((len(images), 2), np.float32)
        self.forget_foreign_handles()

        with self._lock:
            opened = self._open
            features = out[0]

            for i, (number, row, start, stop) in enumerate(
                zip(numbers.tolist(), rows, starts, stops, strict=True)
            ):
                shard = opened.get(number) or self.open_shard(number)
                if shard.counts[row] < stop - start or start == stop:
                    raise UsageError(
                        f"{self._where(number, row)} has {shard.counts[row]} regions; rebuild the"
                        " store without it"
                    )

                try:
                    shard.read(row, out, start, stop)
                except HDF5_ERRORS as error:
                    raise shard.problem(self._where(number, row), error) from error

                if has_non_finite(features[start:stop]):
                    self.read(int(images[i]))  # raises naming the record and what is wrong

                sizes[i] = shard.sizes[row]

        return sizes

    def image_size(self, index: int) -> tuple[float, float]:
        """Return the width and height of an image in pixels."""
        number, row = self.locate(index)
        self.forget_foreign_handles()
        with self._lock:
            width, height = self.open_shard(number).sizes[row]

        return float(width), float(height)

    def label_width(self) -> int:
        """Return the number of entries of a soft label, the same in all shards."""
        # manifests of older stores do not give it
        return self.manifest.get("label_width") or self.open_shard(0).label_width

    def _where(self, shard: int, row: int) -> str:
        return f"{self.path / self.shards[shard]['file']}: image {row}"

    def read(self, index: int, max_regions: int | None = None) -> Regions:
        """Read the regions of one image, in the order stored, at most `max_regions`.

        Raises UsageError naming file and image of a bad record.
        """
        number, row = self.locate(index)
        self.forget_foreign_handles()
        with self._lock:
            return self._read(number, row, max_regions)

    def _read(self, number: int, row: int, max_regions: int | None) -> Regions:
        shard = self.open_shard(number)
        start, stop = (int(v) for v in shard.ranges[row])
        stop = stop if max_regions is None else min(stop, start + max_regions)
        where = self._where(number, row)
        if stop <= start:
            raise UsageError(f"{where} has no regions; rebuild the store without it")

        widths = {"image_features": self.feature_dim, "image_bb": 4}
        widths |= dict.fromkeys(("class_ids", "class_probs"), shard.label_width)
        arrays = {
            name: np.empty((stop - start, widths.get(name, 1)), dtype)
            for name, dtype in shard.columns.items()
        }

        try:
            shard.read(row, list(arrays.values()), 0, stop - start)
        except HDF5_ERRORS as error:
            raise shard.problem(where, error) from error

        size = (float(shard.sizes[row, 0]), float(shard.sizes[row, 1]))
        labels = (arrays["class_ids"], arrays["class_probs"])
        regions = Regions(
            shard.ids[row],
            size,
            arrays["image_features"],
            arrays["image_bb"],
            *labels,
            *(arrays.get(name) for name in ATTRIBUTES),
        )
        problem = record_problem(regions, self.num_classes, self.num_attributes)
        if problem:
            raise UsageError(f"{where} ({regions.image_id}): {problem}")

        regions.boxes, repaired = repair_boxes(regions.boxes, size)
        if repaired and self.strict_boxes:
            raise UsageError(
                f"{where} ({regions.image_id}): {repaired} boxes outside the image or inverted;"
                " drop --strict-boxes to clip them"
            )

        self.repaired_boxes += repaired

        return regions
