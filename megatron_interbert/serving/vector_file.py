"""Read vectors.faiss without FAISS, whose reader maps, and even writes, any other files that an
index names.

We write two kinds, in FAISS's format: ids over plain vectors (`exact`), and ids over a graph of
plain vectors (`hnsw`). Everything else is refused before it is used.

    "IxMp" head, then "IxFI" head and vectors
                 or "IHNf" head and the graph, then "IxFI" head and vectors
    then the ids
"""

import struct
from dataclasses import dataclass
from typing import IO

import numpy as np

HEAD = struct.Struct("<4siqqqBi")  # kind, width, vectors, two unused, trained, metric
INNER_PRODUCT = 0
LEVELS = struct.Struct("<5i")  # the vector where searches begin, the highest level, three settings


class Foreign(ValueError):
    """Represent a file that is not as we write it."""


@dataclass
class Graph:
    """Hold an HNSW graph: the neighbours of all vectors on all their levels, end to end.

    Those of vector i begin at offsets[i]. `sizes[n]` entries are for the levels below n; unused
    entries are -1.
    """

    sizes: np.ndarray
    levels: np.ndarray
    offsets: np.ndarray
    neighbours: np.ndarray
    entry: int
    highest: int

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that FAISS holds, by their names there."""
        return {
            "levels": self.levels,
            "offsets": self.offsets,
            "neighbors": self.neighbours,
        }

    def check(self, count: int) -> None:
        """Raise Foreign if a search would leave the graph, which FAISS does not check."""
        highest = len(self.sizes) - 1
        sizes = self.sizes.astype(np.int64)
        sound = (
            len(self.levels) == count
            and len(self.offsets) == count + 1
            and len(sizes) > 1
            and sizes[0] == 0
            and (np.diff(sizes) > 0).all()
            and ((self.levels >= 1) & (self.levels <= highest)).all()
        )
        if not sound:
            raise Foreign("its graph does not belong to its vectors")

        ends = np.concatenate([[0], np.cumsum(sizes[self.levels])])
        if not np.array_equal(ends, self.offsets) or len(self.neighbours) != ends[-1]:
            raise Foreign("the neighbours in its graph are not where they should be")
        if ((self.neighbours < -1) | (self.neighbours >= count)).any():
            raise Foreign("its graph names vectors that do not exist")

        self._check_levels(ends, sizes)

    def _check_levels(self, ends: np.ndarray, sizes: np.ndarray) -> None:
        """Raise Foreign if a search would look for a vector on a level where it is not."""
        if len(self.levels):
            starts = 0 <= self.entry < len(self.levels)
            if not starts or self.highest != self.levels[self.entry] - 1:
                raise Foreign("its graph has no valid vector to begin searches at")

        for level in range(1, int(self.levels.max(initial=0))):
            members = np.flatnonzero(self.levels > level)
            places = ends[members, None] + np.arange(sizes[level], sizes[level + 1])
            named = self.neighbours[places]
            if (self.levels[named[named >= 0]] <= level).any():
                raise Foreign("its graph names vectors on levels where they are not")


@dataclass
class Stored:
    """Hold the content of a file: ids [n], vectors [n, P] and, for `hnsw`, the graph."""

    ids: np.ndarray
    vectors: np.ndarray
    graph: Graph | None


def read_vectors(file: IO[bytes], kind: str, size: int) -> Stored:
    """Read a file of `size` bytes from its beginning.

    Raises Foreign if it is not a file of that kind as we write it.
    """
    width, count = read_head(file, b"IxMp")
    graph = None

    if kind == "hnsw":
        heads = {read_head(file, b"IHNf")}
        graph = read_graph(file, size)
        heads.add(read_head(file, b"IxFI"))
    else:
        heads = {read_head(file, b"IxFI")}

    if heads != {(width, count)}:
        raise Foreign("its parts are of different sizes")

    vectors = read_array(file, np.float32, size)
    ids = read_array(file, np.int64, size)
    if width < 1 or len(vectors) != width * count or len(ids) != count or file.read(1):
        raise Foreign("its sizes do not agree")
    if not np.isfinite(vectors).all():
        raise Foreign("it holds vectors that are not finite")
    if not np.array_equal(ids, np.arange(count)):
        raise Foreign("its ids are not the numbers of the items")
    if graph is not None:
        graph.check(count)

    return Stored(ids, vectors.reshape(count, width), graph)


def read_head(file: IO[bytes], kind: bytes) -> tuple[int, int]:
    """Read the head of a part: (width, number of vectors).

    Raises Foreign unless it is of that kind, with inner products.
    """
    found, width, count, _, _, trained, metric = HEAD.unpack(exactly(file, HEAD.size))
    if found != kind or metric != INNER_PRODUCT or not trained:
        raise Foreign(f"expected a part {kind.decode()} with inner products, found another one")
    return width, count


def read_graph(file: IO[bytes], size: int) -> Graph:
    """Read a graph, which is between its head and its vectors."""
    read_array(file, np.float64, size)  # probabilities of levels, which follow from the settings
    sizes = read_array(file, np.int32, size)
    levels = read_array(file, np.int32, size)
    offsets = read_array(file, np.uint64, size)
    neighbours = read_array(file, np.int32, size)
    entry, highest, *_ = LEVELS.unpack(exactly(file, LEVELS.size))

    return Graph(sizes, levels, offsets, neighbours, entry, highest)


def read_array(file: IO[bytes], kind: type, size: int) -> np.ndarray:
    """Read a length and an array of that length; raises Foreign if the file is too short."""
    (count,) = struct.unpack("<Q", exactly(file, 8))
    width = np.dtype(kind).itemsize
    if count * width > size - file.tell():
        raise Foreign("it ends too early")

    values = np.empty(count, kind)
    if file.readinto(values.view(np.uint8)) != count * width:
        raise Foreign("it ends too early")

    return values


def exactly(file: IO[bytes], count: int) -> bytes:
    """Read exactly `count` bytes; raises Foreign if there are fewer."""
    data = file.read(count)
    if len(data) != count:
        raise Foreign("it ends too early")
    return data
