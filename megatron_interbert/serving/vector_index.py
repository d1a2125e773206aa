"""Search the vectors of items with FAISS, exactly or through a graph."""

import threading
from collections.abc import Sequence

import faiss
import numpy as np

from megatron_interbert.serving.vector_file import Foreign, Stored

KINDS = ("exact", "hnsw")
LINKS = 32  # per vector in an HNSW graph
BREADTH = 128  # candidates that a search in the graph keeps


class VectorIndex:
    """Find the places of the vectors [P] with the largest inner products.

    `exact` compares with all vectors, `hnsw` searches a graph, for millions of items. A graph
    cannot delete a vector: removed places are skipped, until a new version is built without them.
    """

    def __init__(self, width: int, kind: str = "exact") -> None:
        inner = (
            faiss.IndexFlatIP(width)
            if kind == "exact"
            else faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
        )
        self.kind = kind
        self.faiss = faiss.IndexIDMap(inner)
        self.gone: set[int] = set()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, stored: Stored, kind: str) -> "VectorIndex":
        """Build the index from the content of a file; raises Foreign if its graph is not shaped
        like ours.
        """
        index = cls(stored.vectors.shape[1], kind)
        if stored.graph is None or not len(stored.ids):
            index.add(stored.ids, stored.vectors)
            return index

        inner = faiss.downcast_index(index.faiss.index)
        ours = faiss.vector_to_array(inner.hnsw.cum_nneighbor_per_level)
        if not np.array_equal(stored.graph.sizes, ours):
            raise Foreign(f"its graph does not have {LINKS} links for each vector")

        inner.storage.add(stored.vectors)
        for name, values in stored.graph.arrays().items():
            faiss.copy_array_to_vector(values, getattr(inner.hnsw, name))

        inner.hnsw.entry_point = stored.graph.entry
        inner.hnsw.max_level = stored.graph.highest
        faiss.copy_array_to_vector(stored.ids, index.faiss.id_map)
        inner.ntotal = index.faiss.ntotal = len(stored.ids)

        return index

    def __len__(self) -> int:
        return self.faiss.ntotal - len(self.gone)

    @property
    def width(self) -> int:
        """Return P, the length of a vector."""
        return self.faiss.d

    def add(self, places: Sequence[int], vectors: np.ndarray) -> None:
        """Add vectors [n, P] at places that no vector has had yet."""
        with self._lock:
            self.faiss.add_with_ids(
                np.ascontiguousarray(vectors, np.float32), np.array(places, np.int64)
            )

    def remove(self, place: int) -> None:
        """Exclude a place from all later searches."""
        with self._lock:
            if self.kind == "exact":
                self.faiss.remove_ids(np.array([place], np.int64))
            else:
                self.gone.add(place)

    def search(self, vectors: np.ndarray, k: int) -> list[np.ndarray]:
        """Return the places of the best k items, or fewer, for each vector [n, P], best first."""
        with self._lock:
            most = min(k, len(self))
            if not most:
                return [np.zeros(0, np.int64)] * len(vectors)

            parameters = None
            if self.kind == "hnsw":
                gone = faiss.IDSelectorBatch(np.array(sorted(self.gone), np.int64))
                parameters = faiss.SearchParametersHNSW(
                    sel=faiss.IDSelectorNot(gone), efSearch=max(BREADTH, most)
                )

            _, found = self.faiss.search(
                np.ascontiguousarray(vectors, np.float32), most, params=parameters
            )

        return [row[row >= 0] for row in found]
