"""Measure how large a decoded value is, with shared parts counted each time they occur.

A few bytes of pickle can put one list into ten places of the next, again and again.
"""

from typing import Any

from megatron_interbert.preparation.building.pickles.nodes import UnsafePickle
from megatron_interbert.preparation.building.pickles.stand_ins import UNFINISHED, Dtype, Name

MAX_DEPTH = 60
MAX_VALUES = 10_000_000
SPARE_VALUES = 100_000  # allowed beyond one for each byte of the pickle
SPARE_BYTES = 64 << 20  # allowed beyond twice the size of the pickle

Size = tuple[int, int, int]  # values, bytes of text and arrays, depth


class Measure:
    """Hold the limits for a pickle of `length` bytes and the sizes of the nodes measured so far."""

    def __init__(self, length: int) -> None:
        self.max_values = min(MAX_VALUES, SPARE_VALUES + length)
        self.max_bytes = SPARE_BYTES + 2 * length
        self.known: dict[int, Size | None] = {}  # by the node's id; None: being measured

    def check(self, node: Any, depth: int = 0) -> Size:
        """Measure a value; raise ValueError if it is too large or holds itself, UnsafePickle if it
        holds a function, class or type.
        """
        if isinstance(node, str):
            return 1, len(node), 0

        if isinstance(node, Name | Dtype):
            what = node.name if isinstance(node, Name) else f"type {node.code}"
            raise UnsafePickle(f"it holds {what} itself")

        if not isinstance(node, list):
            return 1, 0, 0

        if node[0] == UNFINISHED:
            raise ValueError("an array without content")

        if node[0] in ("bytes", "array"):
            return 1, node[-1], 0

        return self._container(node, depth)

    def _container(self, node: list[Any], depth: int) -> Size:
        if id(node) in self.known:
            size = self.known[id(node)]
            if size is None:
                raise ValueError("a container that holds itself")

            return size

        if depth > MAX_DEPTH:
            raise ValueError(f"containers nested deeper than {MAX_DEPTH}")

        self.known[id(node)] = None
        size = self._sum(node, depth)
        self.known[id(node)] = size

        return size

    def _sum(self, node: list[Any], depth: int) -> Size:
        values = 1
        size = 0
        below = 0

        for part in node[3:] if node[0] == "objects" else node[1:]:
            part_values, part_size, part_depth = self.check(part, depth + 1)
            values += part_values
            size += part_size
            below = max(below, part_depth)

        if values > self.max_values:
            raise ValueError(f"more than {self.max_values} values")

        if size > self.max_bytes:
            raise ValueError(f"more than {self.max_bytes} bytes of text and arrays")

        if below >= MAX_DEPTH:
            raise ValueError(f"containers nested deeper than {MAX_DEPTH}")

        return values, size, below + 1
