"""Check the array types that foreign files may use: numbers, booleans, text of fixed width.

An object or record type would turn bytes of the file into pointers. This module does without NumPy,
because the process that decodes pickles has none.
"""

import math
import re
from collections.abc import Sequence

CODE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248]|[SU]\d{1,6})", re.ASCII)
MAX_DIMENSIONS = 32
BYTES_OF_A_CHARACTER = {"S": 1, "U": 4}


class NotPlain(ValueError):
    """Report an array of anything except plain numbers, booleans and text."""


def item_size(code: object) -> int:
    """Return the bytes of one element of type `code` (<f4, U12, ..); raise NotPlain for others."""
    if not isinstance(code, str) or not CODE.fullmatch(code):
        raise NotPlain(f"array of type {str(code)[:60]!r}, expected plain numbers or text")

    kind, number = re.fullmatch(r"[<>=|]?(\w)(\d+)", code).groups()

    return int(number) * BYTES_OF_A_CHARACTER.get(kind, 1)


def element_count(shape: Sequence[object]) -> int:
    """Return the number of elements of an array; raise ValueError if `shape` is not a shape."""
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"array of {len(shape)} dimensions")

    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"array of the shape {str(list(shape))[:60]}")

    return math.prod(shape)


def array_bytes(code: object, shape: Sequence[object]) -> int:
    """Return the bytes of an array; raise NotPlain or ValueError if it cannot exist."""
    size = item_size(code)
    if size == 0:
        raise ValueError(f"array of type {code}, whose elements have no bytes")

    return size * element_count(shape)
