"""Pickles from strangers, read without running anything in them: numbers, strings, containers and NumPy arrays, no other object.

Published LMDB rows and the `info` fields of npz files are pickles. The ordinary unpickler would call whatever they name.
"""

import io
import pickle
import pickletools
from typing import Any

import numpy as np


class UnsafePickle(ValueError):
    """The pickle names something other than numbers, strings, containers and arrays."""


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """Stands for NumPy's `_reconstruct`: only the empty array that a following state fills."""
    if kind is not np.ndarray or shape != (0,):
        raise UnsafePickle(f"array of kind {kind!r} and shape {shape!r} at its start")
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _bytes_from_text(text: Any, encoding: Any = "latin1") -> bytes:
    """Stands for `_codecs.encode`, by which Python 3 writes bytes into old pickles."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickle(f"text encoded as {encoding!r}")
    return text.encode("latin1")


def _scalar(dtype: Any, data: Any = None) -> Any:
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, bytes):
        raise UnsafePickle(f"scalar of type {dtype!r}")
    return np.frombuffer(data, dtype)[0]


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise UnsafePickle(f"array of {dtype!r}")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


_NUMPY = {
    ("multiarray", "_reconstruct"): _empty_array,
    ("multiarray", "scalar"): _scalar,
    ("numeric", "_frombuffer"): _frombuffer,
}
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _bytes_from_text,
    ("collections", "OrderedDict"): dict,
    **{(f"{package}.{module}", name): f for (module, name), f in _NUMPY.items() for package in ("numpy.core", "numpy._core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise UnsafePickle(f"it names {module}.{name}, which is neither number, string nor array")

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickle("it refers to something outside of it")


def _check_sizes(data: bytes) -> None:
    """ValueError for a damaged pickle that would make the unpickler ask for absurd amounts of memory."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT", "FRAME") and argument > len(data):
            raise ValueError(f"{operation.name} {argument} in {len(data)} bytes")
        if operation.name == "STOP":
            return


def loads(data: bytes) -> Any:
    """One pickled value. UnsafePickle when it names anything else; ValueError when it is damaged."""
    try:
        _check_sizes(data)
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except UnsafePickle:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"damaged pickle ({type(error).__name__}: {error})") from error
