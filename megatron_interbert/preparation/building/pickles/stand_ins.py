"""Define safe stand-ins for the functions and classes that pickles of plain data name; the
originals are never called.

NumPy's own accept any type and state, and would turn the bytes of a crafted one into pointers.
"""

import codecs
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_interbert.preparation.building.dtype_codes import (
    NotPlain,
    array_bytes,
    element_count,
    item_size,
)
from megatron_interbert.preparation.building.pickles.nodes import Node, Space, UnsafePickle

UNFINISHED = "unfinished array"
OBJECTS = ("O", "O8", "O4")
PLAIN_FLAGS = (0, 8)  # 8: text must be zeroed first; any other flag means objects or records
OBJECT_FLAGS = (63,)  # counted references
FLOATS = {2: "e", 4: "f", 8: "d"}
# looked up now, as the process cannot open files later
WIDE_TEXT = {"<": codecs.lookup("utf-32-le"), ">": codecs.lookup("utf-32-be")}


@dataclass(frozen=True)
class Name:
    """Hold the name of a function or class in a pickle, and the function called in its place."""

    name: str
    call: Callable[..., Any]


@dataclass(eq=False)
class Dtype:
    """Hold an array's type: a plain code, or O for objects, and its byte order (<, >, | or "")."""

    code: str
    order: str = ""

    @property
    def full(self) -> str:
        """Return the code with the byte order, as NumPy writes it."""
        return self.order + self.code


def named(module: str, name: str) -> Name:
    """Return the stand-in for a name; raise UnsafePickle if there is none."""
    call = STAND_INS.get((module, name))
    if call is None:
        full = f"{module}.{name}"[:200]
        raise UnsafePickle(f"it names {full}, expected only numbers, text and plain arrays")

    return Name(f"{module}.{name}", call)


def require(value: Any, kind: str) -> Node:
    """Return a node of the given kind (list, tuple, ..) unchanged; raise ValueError for others."""
    if not isinstance(value, list) or value[0] != kind:
        raise ValueError(f"a value of another kind where a {kind} is expected")

    return value


def parts_of(value: Any, kind: str) -> list[Any]:
    """Return the items of a node of the given kind; raise ValueError for others."""
    return require(value, kind)[1:]


def bytes_of(space: Space, value: Any) -> Node:
    """Return a node of bytes; text becomes bytes too, because Python 2's str is bytes."""
    if isinstance(value, str):
        return space.add(value.encode("latin-1"))

    return require(value, "bytes")


def _dtype(space: Space, code: Any, align: Any = 0, copy: Any = 1) -> Dtype:
    """Stand in for numpy.dtype."""
    if isinstance(code, list) and code[0] == "bytes":
        code = space.read(*code[1:]).decode("latin-1")

    if code in OBJECTS:
        return Dtype("O")

    try:
        item_size(code)
    except NotPlain as error:
        raise UnsafePickle(str(error)) from error

    if code[0] in "<>=|":
        return Dtype(code[1:], code[0].replace("=", ""))

    return Dtype(code)


def set_dtype(dtype: Dtype, state: Any) -> None:
    """Stand in for dtype.__setstate__: set the byte order; raise UnsafePickle for anything else."""
    parts = parts_of(state, "tuple")
    if len(parts) not in (7, 8) or parts[1] not in ("<", ">", "|", "="):
        raise UnsafePickle(f"type {dtype.code} with a state of an unknown kind")

    _, order, *fields = parts[:5]
    objects = dtype.code == "O"
    sizes = (-1,) if objects else (-1, item_size(dtype.code))
    if fields != [None, None, None] or parts[5] not in sizes:
        raise UnsafePickle(f"type {dtype.code} with fields or a size that it does not have")

    if len(parts) == 8 and parts[7] not in (OBJECT_FLAGS if objects else PLAIN_FLAGS):
        raise UnsafePickle(f"type {dtype.code} with flags of another type")

    dtype.order = order.replace("=", "")


def _reconstruct(space: Space, kind: Any, shape: Any, code: Any) -> Node:
    """Stand in for NumPy's _reconstruct: return an array that its state fills later."""
    if not isinstance(kind, Name) or kind.call is not _ndarray:
        raise UnsafePickle("array of a class other than numpy.ndarray")

    return [UNFINISHED]


def set_array(space: Space, array: Node, state: Any) -> None:
    """Stand in for ndarray.__setstate__, whose state is (version, shape, type, Fortran, data)."""
    parts = parts_of(state, "tuple")
    if len(parts) != 5:
        raise ValueError(f"an array's state of {len(parts)} parts")

    _, shape, dtype, fortran, data = parts
    array[:] = _array(space, dtype, shape, data, "F" if fortran else "C")


def _frombuffer(
    space: Space, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None
) -> Node:
    """Stand in for NumPy's _frombuffer, with which protocol 5 writes arrays."""
    if order == "K" and axes is not None:
        order = parts_of(axes, "tuple")
        whole = all(type(axis) is int for axis in order)
        if not whole or sorted(order) != list(range(len(parts_of(shape, "tuple")))):
            raise ValueError("axes that are not a permutation of the array's")

    elif order not in ("C", "F"):
        raise ValueError("an array in an unknown order")

    return _array(space, dtype, shape, data, order)


def _array(space: Space, dtype: Any, shape: Any, data: Any, order: Any) -> Node:
    lengths = parts_of(shape, "tuple")
    if not isinstance(dtype, Dtype):
        raise ValueError("an array without a type")

    if dtype.code == "O":
        given = len(require(data, "list")) - 1
        if element_count(lengths) != given:
            raise ValueError(f"array of the shape {str(lengths)[:60]} with {given} objects")

        return ["objects", lengths, order, data]

    node = bytes_of(space, data)
    expected = array_bytes(dtype.full, lengths)
    if node[2] != expected:
        raise ValueError(f"array with {node[2]} bytes of data, expected {expected}")

    return ["array", dtype.full, lengths, order, *node[1:]]


def _scalar(space: Space, dtype: Any, data: Any = None) -> Any:
    """Stand in for NumPy's scalar: return Python's own number, boolean or text, or a bytes node."""
    if not isinstance(dtype, Dtype) or dtype.code == "O":
        raise UnsafePickle("NumPy scalar of an object")

    content = space.read(*bytes_of(space, data)[1:])
    if len(content) != item_size(dtype.full):
        raise ValueError(f"scalar of type {dtype.full} with {len(content)} bytes")

    order = ">" if dtype.order == ">" else "<"
    kind = dtype.code[0]
    if kind == "f":
        return struct.unpack(order + FLOATS[len(content)], content)[0]

    if kind == "S":
        return space.add(content.rstrip(b"\0"))

    if kind == "U":
        return WIDE_TEXT[order].decode(content)[0].rstrip("\0")

    number = int.from_bytes(content, "big" if order == ">" else "little", signed=kind == "i")

    return bool(number) if kind == "b" else number


def _encode(space: Space, text: Any, encoding: Any = "latin1") -> Node:
    """Stand in for _codecs.encode, with which Python 3 writes bytes in old protocols."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickle("text in an encoding other than latin1")

    return space.add(text.encode("latin-1"))


def _no_bytes(space: Space) -> Node:
    """Stand in for bytes(), which old protocols call for empty bytes."""
    return space.add(b"")


def _ordered(space: Space, pairs: Any = None) -> Node:
    """Stand in for OrderedDict, which Python 2 calls with a list of pairs."""
    if pairs is None:
        return ["dict"]

    node: Node = ["dict"]
    for pair in parts_of(pairs, "list"):
        if not isinstance(pair, list) or pair[0] not in ("list", "tuple") or len(pair) != 3:
            raise ValueError("an ordered dictionary of something other than pairs")

        add_pairs(node, pair[1:])

    return node


def _set(space: Space, items: Any = None) -> Node:
    return ["set", *_members(items)]


def _frozenset(space: Space, items: Any = None) -> Node:
    return ["frozenset", *_members(items)]


def _members(items: Any) -> list[Any]:
    members = [] if items is None else parts_of(items, "list")
    for member in members:
        check_key(member)

    return members


def _ndarray(space: Space, *parts: Any) -> Any:
    """Refuse to be called for numpy.ndarray, which is only an argument of _reconstruct."""
    raise UnsafePickle("it calls numpy.ndarray")


def add_pairs(mapping: Any, pairs: list[Any]) -> None:
    """Append alternating keys and values to a dictionary node; raise ValueError for bad keys."""
    require(mapping, "dict")
    if len(pairs) % 2:
        raise ValueError("a key without a value")

    for key in pairs[::2]:
        check_key(key)

    mapping += pairs


def check_key(key: Any) -> None:
    """Raise ValueError for keys other than text, bytes and numbers: millions of containers could
    share one hash.
    """
    if isinstance(key, list) and key[0] != "bytes":
        raise ValueError(f"a key or a set's member that is a {key[0]}")


def _all_stand_ins() -> dict[tuple[str, str], Callable[..., Any]]:
    table = {
        ("numpy", "ndarray"): _ndarray,
        ("numpy", "dtype"): _dtype,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): _ordered,
    }
    for package in ("numpy.core", "numpy._core"):  # before NumPy 2, and since
        table[f"{package}.multiarray", "_reconstruct"] = _reconstruct
        table[f"{package}.multiarray", "scalar"] = _scalar
        table[f"{package}.numeric", "_frombuffer"] = _frombuffer

    for module in ("__builtin__", "builtins"):  # Python 2, 3
        table[module, "bytes"] = _no_bytes
        table[module, "set"] = _set
        table[module, "frozenset"] = _frozenset

    return table


STAND_INS = _all_stand_ins()
