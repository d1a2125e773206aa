"""What the process that decodes sends: JSON that stands for values, and bytes by their place.

    null, booleans, numbers, text                    themselves
    ["list", item, ..], also tuple, set, frozenset
    ["dict", key, value, ..]
    ["bytes", start, length]
    ["array", code, shape, order, start, length]     order: "C", "F", or axes of a transposition
    ["objects", shape, order, ["list", item, ..]]    an array of any of these values

`start` counts through the pickle itself and then through the tail: bytes that do not stand in the
pickle as they are, for old protocols write them as text.
"""

import struct
from typing import Any

REQUEST = struct.Struct("<Q")  # length of the pickle that follows
REPLY = struct.Struct("<BQQ")  # what it is, and the lengths of the text and the tail that follow
READY = b"ready"
VALUE, DAMAGED, UNSAFE = range(3)

Node = list[Any]


class UnsafePickle(ValueError):
    """The pickle names something other than numbers, text, containers and plain arrays."""


class Space:
    """All bytes that nodes name by their place: those of the pickle, then the tail."""

    def __init__(self, data: bytes | bytearray, tail: bytes | bytearray = b"") -> None:
        self.data = memoryview(data)
        self.tail = tail

    def read(self, start: int, length: int) -> bytes:
        """Copy the bytes of a place; ValueError when there is no such place."""
        if not (type(start) is int and type(length) is int and start >= 0 and length >= 0):
            raise ValueError(f"no bytes at {start}")

        pool = self.data
        if start >= len(pool):
            start -= len(pool)
            pool = self.tail

        if start + length > len(pool):
            raise ValueError(f"no {length} bytes at {start}")

        return bytes(pool[start : start + length])

    def add(self, content: bytes) -> Node:
        """Append to the tail; the node of the new bytes.

        ValueError when the tail grows beyond the pickle: then text is used many times over.
        """
        start = len(self.data) + len(self.tail)
        self.tail += content
        if len(self.tail) > len(self.data) + (1 << 20):
            raise ValueError("more bytes than it has text for")

        return ["bytes", start, len(content)]
