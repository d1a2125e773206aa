"""What stands for the functions and classes that pickles of plain data name. None is ever called.

NumPy's own would take any type and any state, and make pointers of the bytes in a crafted one.
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
PLAIN_FLAGS = (0, 8)  # 8: text must be zeroed first; any other flag tells of objects or records
OBJECT_FLAGS = (63,)  # references, counted
FLOATS = {2: "e", 4: "f", 8: "d"}
WIDE_TEXT = {"<": codecs.lookup("utf-32-le"), ">": codecs.lookup("utf-32-be")}  # now: no file later


@dataclass(frozen=True)
class Name:
    """A function or class that a pickle names, and what is done in its place."""

    name: str
    call: Callable[..., Any]


@dataclass(eq=False)
class Dtype:
    """An array's type: a simple code or objects, and its byte order (<, >, | or none)."""

    code: str
    order: str = ""

    @property
    def full(self) -> str:
        """The code with the byte order, as NumPy writes it."""
        return self.order + self.code


def named(module: str, name: str) -> Name:
    """Find what stands for a name; UnsafePickle when nothing does."""
    call = STAND_INS.get((module, name))
    if call is None:
        full = f"{module}.{name}"[:200]
        raise UnsafePickle(f"it names {full}, which is neither number, text nor plain array")

    return Name(f"{module}.{name}", call)


def require(value: Any, kind: str) -> Node:
    """Give a node back that is of a kind: list, tuple, ..; ValueError when it is not."""
    if not isinstance(value, list) or value[0] != kind:
        raise ValueError(f"something else where a {kind} is expected")

    return value


def parts_of(value: Any, kind: str) -> list[Any]:
    """Give the items of a node of a kind; ValueError when it is of another."""
    return require(value, kind)[1:]


def bytes_of(space: Space, value: Any) -> Node:
    """Give the node of bytes; text of Python 2, whose str were bytes, becomes them."""
    if isinstance(value, str):
        return space.add(value.encode("latin-1"))

    return require(value, "bytes")


def _dtype(space: Space, code: Any, align: Any = 0, copy: Any = 1) -> Dtype:
    """Stand for numpy.dtype."""
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
    """Stand for dtype.__setstate__: the byte order. UnsafePickle when it asks for more."""
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
    """Stand for NumPy's _reconstruct: an array that a following state fills."""
    if not isinstance(kind, Name) or kind.call is not _ndarray:
        raise UnsafePickle("array of a class of its own")

    return [UNFINISHED]


def set_array(space: Space, array: Node, state: Any) -> None:
    """Stand for ndarray.__setstate__: (version, shape, type, whether in Fortran's order, data)."""
    parts = parts_of(state, "tuple")
    if len(parts) != 5:
        raise ValueError(f"an array's state of {len(parts)} parts")

    _, shape, dtype, fortran, data = parts
    array[:] = _array(space, dtype, shape, data, "F" if fortran else "C")


def _frombuffer(
    space: Space, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None
) -> Node:
    """Stand for NumPy's _frombuffer, by which protocol 5 writes arrays."""
    if order == "K" and axes is not None:
        order = parts_of(axes, "tuple")
        whole = all(type(axis) is int for axis in order)
        if not whole or sorted(order) != list(range(len(parts_of(shape, "tuple")))):
            raise ValueError("an array's axes that are none")

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
    """Stand for NumPy's scalar: Python's own number, boolean, text or bytes."""
    if not isinstance(dtype, Dtype) or dtype.code == "O":
        raise UnsafePickle("NumPy's scalar of an object")

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
    """Stand for _codecs.encode, by which Python 3 writes bytes into old pickles."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickle("text in another encoding than latin1")

    return space.add(text.encode("latin-1"))


def _no_bytes(space: Space) -> Node:
    """Stand for bytes(), the empty ones of old pickles."""
    return space.add(b"")


def _ordered(space: Space, pairs: Any = None) -> Node:
    """Stand for OrderedDict; Python 2 gives it a list of pairs."""
    if pairs is None:
        return ["dict"]

    node: Node = ["dict"]
    for pair in parts_of(pairs, "list"):
        if not isinstance(pair, list) or pair[0] not in ("list", "tuple") or len(pair) != 3:
            raise ValueError("an ordered dictionary of something else than pairs")

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
    """Refuse to stand for numpy.ndarray by itself: it only says what _reconstruct makes."""
    raise UnsafePickle("it calls numpy.ndarray")


def add_pairs(mapping: Any, pairs: list[Any]) -> None:
    """Append keys and values, in turn, to a dictionary."""
    require(mapping, "dict")
    if len(pairs) % 2:
        raise ValueError("a key without a value")

    for key in pairs[::2]:
        check_key(key)

    mapping += pairs


def check_key(key: Any) -> None:
    """Take text, bytes and numbers for keys; others could share one hash by the million."""
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
