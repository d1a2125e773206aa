"""Build NumPy arrays from bytes of foreign files, after checking type, shape and length."""

from collections.abc import Sequence

import numpy as np

from megatron_interbert.preparation.building.dtype_codes import array_bytes


def make_array(
    code: str,
    shape: Sequence[int],
    data: bytes | bytearray | memoryview,
    order: str | Sequence[int] = "C",
) -> np.ndarray:
    """Build an array that owns its memory, of `shape` and type `code` (<f4, U12, ..).

    order: C or F, or the axes by which the array in C order is transposed. Raises NotPlain for any
    other type, ValueError if the length of `data` does not match type and shape.
    """
    expected = array_bytes(code, shape)
    if len(data) != expected:
        asked = f"{tuple(shape)} {code}"
        raise ValueError(f"array of {asked} with {len(data)} bytes of data, expected {expected}")

    flat = np.frombuffer(data, code)
    if flat.dtype == np.bool_:
        flat = flat.view(np.uint8) != 0  # other bytes than 0 and 1 would make NumPy miscount

    return arranged(flat, shape, order).copy(order="K")


def arranged(flat: np.ndarray, shape: Sequence[int], order: str | Sequence[int]) -> np.ndarray:
    """Return a view [shape] of a flat array whose elements are in `order`, as for make_array."""
    if order in ("C", "F"):
        return flat.reshape(tuple(shape), order=order)

    return flat.reshape(tuple(shape)).transpose(order)
