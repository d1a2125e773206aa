"""The types of arrays that foreign files may name: numbers, booleans, text of fixed width.

A type of objects or records would make their bytes into pointers. Without NumPy, for the process
that decodes pickles has none.
"""

import math
import re
from collections.abc import Sequence

CODE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248]|[SU]\d{1,6})", re.ASCII)
MAX_DIMENSIONS = 32
BYTES_OF_A_CHARACTER = {"S": 1, "U": 4}


class NotPlain(ValueError):
    """An array of anything but plain numbers, booleans and text."""


def item_size(code: object) -> int:
    """Give the bytes of one element of `code` (<f4, U12, ..); NotPlain for any other."""
    if not isinstance(code, str) or not CODE.fullmatch(code):
        raise NotPlain(f"array of type {str(code)[:60]!r}, neither plain numbers nor text")

    kind, number = re.fullmatch(r"[<>=|]?(\w)(\d+)", code).groups()

    return int(number) * BYTES_OF_A_CHARACTER.get(kind, 1)


def element_count(shape: Sequence[object]) -> int:
    """Give the number of elements of an array; ValueError when `shape` is no shape."""
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"array of {len(shape)} dimensions")

    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"array of the shape {str(list(shape))[:60]}")

    return math.prod(shape)


def array_bytes(code: object, shape: Sequence[object]) -> int:
    """Give the bytes of an array; NotPlain or ValueError when there is no such array."""
    size = item_size(code)
    if size == 0:
        raise ValueError(f"array of type {code}, whose elements have no bytes")

    return size * element_count(shape)
