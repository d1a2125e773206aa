"""Read foreign pickles: decoded in a confined process, rebuilt here from checked parts."""

import json
from typing import Any

import numpy as np

from megatron_interbert.preparation.building.dtype_codes import element_count
from megatron_interbert.preparation.building.pickles.measure import MAX_DEPTH
from megatron_interbert.preparation.building.pickles.nodes import (
    UNSAFE,
    VALUE,
    Node,
    Space,
    UnsafePickle,
)
from megatron_interbert.preparation.building.pickles.process import PickleProcess
from megatron_interbert.preparation.building.plain_arrays import arranged, make_array

MAX_PICKLE = 256 << 20  # bytes
OLD_STARTS = (b"(", b"}", b"]")  # protocols 0 and 1: a mark, an empty dictionary, an empty list
TYPES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}

_process = PickleProcess()  # one for each reading process, started with the first pickle


def loads(data: bytes) -> Any:
    """Read one pickled value: numbers, text, bytes, containers, NumPy's plain arrays.

    NumPy's scalars become Python's. Raises UnsafePickle if it names anything else, ValueError if it
    is damaged or exceeds a limit, UsageError if the decoding process cannot be started.
    """
    if len(data) > MAX_PICKLE:
        raise ValueError(f"a pickle of {len(data)} bytes, expected at most {MAX_PICKLE}")

    kind, text, tail = _process.ask(data)
    if kind == UNSAFE:
        raise UnsafePickle(text.decode())

    if kind != VALUE:
        raise ValueError(f"damaged pickle ({text.decode('utf-8', 'replace')})")

    try:
        return _value(json.loads(text), Space(data, tail))
    except (TypeError, IndexError, RecursionError, OverflowError) as error:
        raise ValueError(f"damaged pickle ({type(error).__name__}: {error})") from error


def is_pickle(data: bytes) -> bool:
    """Check whether bytes look like the pickle of a container, of any protocol."""
    if data[:1] == b"\x80":
        return data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")

    return data[:1] in OLD_STARTS and data[-1:] == b"."


def _value(node: Any, space: Space, depth: int = 0) -> Any:
    """Build a value from its node; raise ValueError if the node is malformed."""
    if isinstance(node, dict):
        raise ValueError("a part without a kind")

    if not isinstance(node, list):
        return node

    if depth > MAX_DEPTH + 1:
        raise ValueError(f"containers nested deeper than {MAX_DEPTH}")

    kind = node[0]
    if kind == "bytes":
        return space.read(*node[1:])

    if kind == "array":
        code, shape, order, start, length = node[1:]
        return make_array(code, shape, space.read(start, length), order)

    if kind == "objects":
        return _object_array(node, space, depth)

    if kind not in TYPES and kind != "dict":
        raise ValueError(f"a part of the unknown kind {kind}")

    parts = [_value(part, space, depth + 1) for part in node[1:]]
    if kind == "dict":
        return dict(zip(parts[::2], parts[1::2], strict=True))

    return TYPES[kind](parts)


def _object_array(node: Node, space: Space, depth: int) -> np.ndarray:
    """Build an array of objects from its node, objects included."""
    shape, order, content = node[1:]
    items = _value(content, space, depth + 1)
    if type(items) is not list or len(items) != element_count(shape):
        raise ValueError("an array of objects whose shape does not match their number")

    flat = np.empty(len(items), object)
    for index, item in enumerate(items):
        flat[index] = item

    return arranged(flat, shape, order)
