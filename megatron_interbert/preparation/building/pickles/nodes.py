"""Define what the decoding process sends: JSON for the values, and bytes named by their place.

    null, booleans, numbers, text                    themselves
    ["list", item, ..], also tuple, set, frozenset
    ["dict", key, value, ..]
    ["bytes", start, length]
    ["array", code, shape, order, start, length]     order: "C", "F", or axes of a transposition
    ["objects", shape, order, ["list", item, ..]]    an array of any of these values

`start` counts through the pickle and then through the tail: bytes that are not in the pickle
literally, because old protocols write them as text.
"""

import struct
from typing import Any

REQUEST = struct.Struct("<Q")  # length of the pickle that follows
REPLY = struct.Struct("<BQQ")  # kind, and the lengths of the text and the tail that follow
READY = b"ready"
VALUE, DAMAGED, UNSAFE = range(3)

Node = list[Any]


class UnsafePickle(ValueError):
    """Report a pickle that names something other than numbers, text, containers, plain arrays."""


class Space:
    """Hold the bytes that nodes name by their place: those of the pickle, then the tail."""

    def __init__(self, data: bytes | bytearray, tail: bytes | bytearray = b"") -> None:
        self.data = memoryview(data)
        self.tail = tail

    def read(self, start: int, length: int) -> bytes:
        """Return a copy of the bytes at a place; raise ValueError if it does not exist."""
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
        """Append bytes to the tail and return their node.

        Raises ValueError if the tail outgrows the pickle: then the same text is used many times.
        """
        start = len(self.data) + len(self.tail)
        self.tail += content
        if len(self.tail) > len(self.data) + (1 << 20):
            raise ValueError("more bytes than its text can stand for")

        return ["bytes", start, len(content)]
