"""Read the clusters of a store's regions, which interbert cluster-features has found."""

from typing import Any

import numpy as np

from megatron_interbert.data.hdf5 import reading_problem
from megatron_interbert.data.manifest import REPEAT
from megatron_interbert.data.neighbours import NoTable, read_neighbours
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError


class RegionClusters:
    """Hold the number of the cluster of each region of a store, memory-mapped.

    `centroids` is the sha256 of the file of centroids: stores with the same ones have clusters that
    mean the same.
    """

    def __init__(self, store: RegionStore) -> None:
        entry = store.manifest.get("clusters")
        if entry is None:
            raise UsageError(
                f"{store.path}: its regions have no clusters; find them with interbert"
                " cluster-features"
            )

        self.count: int = entry["count"]
        self.centroids: str = entry["centroids"]["sha256"]
        counts = store.region_counts()
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._ids = _opened(store, entry, int(self._first[-1]))

    def of_images(self, images: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the clusters of the first `counts` [B] regions of some images [B], end to end:
        int32 [R].
        """
        ends = np.cumsum(counts)
        places = np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)
        return self._ids[np.repeat(self._first[images], counts) + places, 0]


def _opened(store: RegionStore, entry: dict[str, Any], regions: int) -> np.ndarray:
    path = store.path / entry["file"]

    try:
        ids = read_neighbours(path, regions, entry["count"])
        if ids.min(initial=0) < 0:
            raise NoTable("a region without a cluster")
        return ids
    except (OSError, NoTable) as error:
        expected = f"expected the cluster of each of {regions} regions; {REPEAT}"
        raise reading_problem(path, error, expected, "") from error
