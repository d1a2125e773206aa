"""Turn a value of a published record into an array: base64 text, text of bytes, a list or an array
of any shape.
"""

import ast
import base64
import binascii
from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_interbert.preparation.building.sources.fields import BadRecord

MATRICES = ("features", "boxes", "class_probs")
WORDS = {"class_ids": "class ids", "class_confidence": "class confidences"}
FLOAT32 = np.dtype("<f4")
# the type of floats is judged by the first letters of the first texts of a record
START = 1 << 14
SOME = 16
LARGE = 65504.0  # of features: the largest float16
TINY = 1e-30  # no feature is as small
SOUND = 0.99  # of the features, at least: some may be NaN
LARGE_HALF = 1000.0  # a fifth of all float16 are larger; no feature is
FEW = 64  # different numbers; float32 that was rounded before has fewer in its lower halves


def unquoted(value: Any) -> Any:
    """Return what `str()` of bytes has made text of: b'text' becomes text."""
    if not isinstance(value, str | bytes):
        return value

    text = value[:2].decode("latin-1") if isinstance(value, bytes) else value[:2]
    if text not in ("b'", 'b"') or len(value) < 3 or value[-1:] != value[1:2]:
        return value
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")

    if "\\" not in value:
        return value[2:-1]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):  # it only looks like that
        return value


def array_of(value: Any, rows: int, dtype: Any, name: str) -> np.ndarray:
    """Return a field as an array, from its base64 text, a list or an array; `rows` regions (0:
    unknown).
    """
    if isinstance(value, list | tuple):
        value = _of_list(value, dtype, name)
    if isinstance(value, str | bytes):
        data = bytes_of(value, name)
        if rows <= 0 or not data or len(data) % (np.dtype(dtype).itemsize * rows):
            raise BadRecord(
                f"{name} does not fit the number of boxes", f"{len(data)} bytes for {rows} boxes"
            )
        return np.frombuffer(data, dtype).reshape(rows, -1)

    array = np.asarray(value)
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    while array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 1 and rows and array.size % rows == 0 and name in MATRICES:
        array = array.reshape(rows, -1)

    return array


def _of_list(value: Any, dtype: Any, name: str) -> np.ndarray:
    """Convert a list of numbers, or of the base64 text of each region, to an array.

    NumPy would give each text of a list the width of the longest.
    """
    if value and all(isinstance(item, str | bytes) for item in value):
        parts = [np.frombuffer(bytes_of(unquoted(item), name), dtype) for item in value]
        if len({len(part) for part in parts}) > 1:
            raise BadRecord(f"{name} of different lengths")
        return np.stack(parts)

    if holds_text(value):
        raise BadRecord(f"{name} are not numbers", "a list with text in it")

    return np.asarray(value)


def holds_text(value: Any) -> bool:
    """Check whether a list has text in it, at any depth."""
    if not isinstance(value, list | tuple):
        return False

    return any(isinstance(item, str | bytes) or holds_text(item) for item in value)


def trimmed(array: np.ndarray, rows: int, name: str) -> np.ndarray:
    """Return the rows of an array that belong to regions, without those by which it is padded."""
    if array.ndim == 0 or len(array) < rows:
        raise BadRecord(
            f"{WORDS.get(name, name)} do not fit the number of boxes",
            f"{array.shape} for {rows} boxes",
        )

    return array[:rows] if rows else array


def decoded(value: str | bytes, rows: int, codes: tuple[str, ...], name: str) -> np.ndarray:
    """Return base64 text as an array with one row for each region."""
    data = bytes_of(value, name)
    for code in codes:
        width, rest = divmod(len(data), rows * np.dtype(code).itemsize)
        if rest == 0 and (width == 1 or (width > 1 and name == "class_probs")):
            return np.frombuffer(data, code).reshape(rows, -1)

    raise BadRecord(
        f"{WORDS.get(name, name)} do not fit the number of boxes",
        f"{len(data)} bytes for {rows} boxes",
    )


def bytes_of(text: str | bytes, name: str) -> bytes:
    """Decode base64 text; raise BadRecord if it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise BadRecord(f"{name} is not base64", str(error)) from error


def start_of(value: Any, name: str) -> bytes:
    """Return the first bytes of base64 text, or of a list of texts; none of an array, which has a
    type of its own.
    """
    texts = value if isinstance(value, list | tuple) else [value]
    if not texts or not all(isinstance(text, str | bytes) for text in texts):
        return b""

    start = b"".join(bytes_of(unquoted(text)[:START], name) for text in texts[:SOME])

    return start[: len(start) // 8 * 8]


def float_type(starts: Iterable[bytes]) -> np.dtype:
    """Return the type of the floats in some bytes: float32, unless they only make sense as float16
    or float64.
    """
    data = b"".join(starts)
    singles = np.frombuffer(data, FLOAT32)
    doubles = np.frombuffer(data, "<f8")
    lower = np.frombuffer(data, "<f2")[::2]  # of float32, where it may be any number

    filled = singles != 0
    if len(singles) > FEW and filled.any() and not filled[::2].any():  # they were rounded before
        return doubles.dtype
    if _share_between(lower, 0, LARGE_HALF) > SOUND and len(np.unique(lower)) > FEW:
        return lower.dtype
    if _share_between(singles, TINY, LARGE) < SOUND < _share_between(doubles, TINY, LARGE):
        return doubles.dtype

    return FLOAT32


def _share_between(numbers: np.ndarray, least: float, most: float) -> float:
    """Return the share of numbers other than 0 whose size is between two; 0 if there are none."""
    sizes = np.abs(numbers[numbers != 0])
    return float(((sizes > least) & (sizes <= most)).mean()) if len(sizes) else 0.0
