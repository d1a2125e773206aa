"""Decode the opcodes of a pickle into nodes, without ever importing or calling what it names.

Supports numbers, text, containers and NumPy's arrays as protocols 0 to 5 of Python 2 and 3 write
them.
"""

import codecs
import pickle
import struct
from collections.abc import Callable
from typing import Any

from megatron_interbert.preparation.building.pickles.nodes import Node, Space, UnsafePickle
from megatron_interbert.preparation.building.pickles.stand_ins import (
    UNFINISHED,
    Dtype,
    Name,
    add_pairs,
    check_key,
    named,
    parts_of,
    require,
    set_array,
    set_dtype,
)

MAX_OPCODES = 20_000_000
MAX_DIGITS = 20  # decimal digits of an integer: 64 bits
RAW_UNICODE = codecs.lookup("raw_unicode_escape")  # now, as the process cannot open files later


class Decoder:
    """Hold one pickle and the state of the machine that runs it: a stack, its marks and a memo."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data
        self.place = 0
        self.space = Space(data, bytearray())
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stack under each mark
        self.memo: dict[int, Any] = {}

    def decode(self) -> Any:
        """Run the pickle and return its value as a node; raise ValueError if it is damaged,
        UnsafePickle if it names more than data.
        """
        for _ in range(MAX_OPCODES):
            opcode = self.byte()
            if opcode == pickle.STOP[0]:
                return self.pop()

            run = OPCODES.get(opcode)
            if run is None:
                raise ValueError(f"unknown opcode {opcode:#04x} at {self.place - 1}")

            run(self)

        raise ValueError(f"more than {MAX_OPCODES} opcodes")

    def byte(self) -> int:
        """Read the next byte."""
        if self.place >= len(self.data):
            raise ValueError("it ends too early")

        self.place += 1

        return self.data[self.place - 1]

    def skip(self, length: int) -> int:
        """Skip `length` bytes and return where they start; raise ValueError if they are missing."""
        start = self.place
        if length < 0 or start + length > len(self.data):
            raise ValueError(f"{length} bytes are missing at {start}")

        self.place += length

        return start

    def take(self, length: int) -> bytes:
        """Read `length` bytes."""
        start = self.skip(length)
        return bytes(self.data[start : start + length])

    def number(self, form: struct.Struct) -> Any:
        """Read one binary number."""
        return form.unpack(self.take(form.size))[0]

    def line(self) -> bytes:
        """Read the rest of the line, without its end."""
        end = self.data.find(b"\n", self.place)
        if end < 0:
            raise ValueError("a line does not end")

        content = self.take(end - self.place)
        self.place += 1

        return content

    def pop(self) -> Any:
        """Remove and return the top of the stack."""
        if not self.stack:
            raise ValueError("its stack is empty")

        return self.stack.pop()

    def top(self) -> Any:
        """Return the top of the stack, which stays."""
        if not self.stack:
            raise ValueError("its stack is empty")

        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        """Remove the last mark and return everything above it."""
        if not self.below:
            raise ValueError("no mark in its stack")

        items = self.stack
        self.stack = self.below.pop()

        return items

    def recall(self, index: int) -> None:
        """Push the memo's entry `index`."""
        if index not in self.memo:
            raise ValueError(f"nothing under {index} in its memo")

        self.stack.append(self.memo[index])


OPCODES: dict[int, Callable[[Decoder], None]] = {}

U1, U2, U4, U8 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q"))
I4 = struct.Struct("<i")
F8 = struct.Struct(">d")


def on(*opcodes: bytes) -> Callable[[Any], Any]:
    """Register the decorated function for some opcodes."""

    def enter(function: Any) -> Any:
        for opcode in opcodes:
            OPCODES[opcode[0]] = function
        return function

    return enter


def pushes(opcode: bytes, read: Callable[[Decoder], Any]) -> None:
    """Register an opcode that only pushes the result of `read`."""

    def push(decoder: Decoder) -> None:
        value = read(decoder)  # first, as it may replace decoder.stack by the one below a mark
        decoder.stack.append(value)

    OPCODES[opcode[0]] = push


def decimal(text: bytes) -> int:
    """Parse a decimal integer; raise ValueError beyond 64 bits."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")

    return whole(int(text))


def whole(number: int) -> int:
    """Return an integer unchanged; raise ValueError beyond 64 bits."""
    if not -(1 << 63) <= number < 1 << 64:
        raise ValueError("an integer beyond 64 bits")

    return number


def short_int(decoder: Decoder) -> int | bool:
    """Read INT, in which 00 and 01 are booleans."""
    text = decoder.line()
    if text in (b"00", b"01"):
        return text == b"01"

    return decimal(text)


def long_int(decoder: Decoder, form: struct.Struct) -> int:
    """Read an integer in two's complement, with a length of type `form` before it."""
    return whole(int.from_bytes(decoder.take(decoder.number(form)), "little", signed=True))


def float_line(decoder: Decoder) -> float:
    """Read FLOAT, a number as text."""
    text = decoder.line()
    if len(text) > 400:
        raise ValueError(f"a number of {len(text)} characters")

    return float(text)


def quoted(decoder: Decoder) -> str:
    """Read STRING: Python 2's text in quotes, with escapes."""
    line = decoder.line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError("text without quotes")

    return codecs.escape_decode(line[1:-1])[0].decode("latin-1")


def text(decoder: Decoder, form: struct.Struct) -> str:
    """Read UTF-8 text, with a length of type `form` before it."""
    return decoder.take(decoder.number(form)).decode("utf-8", "surrogatepass")


def bytes_in_place(decoder: Decoder, form: struct.Struct) -> Node:
    """Skip bytes with a length of type `form` before them; return a node that names their place."""
    length = decoder.number(form)
    return ["bytes", decoder.skip(length), length]


pushes(pickle.NONE, lambda decoder: None)
pushes(pickle.NEWTRUE, lambda decoder: True)
pushes(pickle.NEWFALSE, lambda decoder: False)

pushes(pickle.INT, short_int)
pushes(pickle.LONG, lambda decoder: decimal(decoder.line().removesuffix(b"L")))
pushes(pickle.BININT, lambda decoder: decoder.number(I4))
pushes(pickle.BININT1, lambda decoder: decoder.number(U1))
pushes(pickle.BININT2, lambda decoder: decoder.number(U2))
pushes(pickle.LONG1, lambda decoder: long_int(decoder, U1))
pushes(pickle.LONG4, lambda decoder: long_int(decoder, U4))
pushes(pickle.FLOAT, float_line)
pushes(pickle.BINFLOAT, lambda decoder: decoder.number(F8))

pushes(pickle.STRING, quoted)
pushes(pickle.BINSTRING, lambda decoder: decoder.take(decoder.number(U4)).decode("latin-1"))
pushes(pickle.SHORT_BINSTRING, lambda decoder: decoder.take(decoder.byte()).decode("latin-1"))
pushes(pickle.UNICODE, lambda decoder: RAW_UNICODE.decode(decoder.line())[0])
pushes(pickle.SHORT_BINUNICODE, lambda decoder: text(decoder, U1))
pushes(pickle.BINUNICODE, lambda decoder: text(decoder, U4))
pushes(pickle.BINUNICODE8, lambda decoder: text(decoder, U8))

pushes(pickle.SHORT_BINBYTES, lambda decoder: bytes_in_place(decoder, U1))
pushes(pickle.BINBYTES, lambda decoder: bytes_in_place(decoder, U4))
pushes(pickle.BINBYTES8, lambda decoder: bytes_in_place(decoder, U8))
pushes(pickle.BYTEARRAY8, lambda decoder: bytes_in_place(decoder, U8))

pushes(pickle.EMPTY_TUPLE, lambda decoder: ["tuple"])
pushes(pickle.EMPTY_LIST, lambda decoder: ["list"])
pushes(pickle.EMPTY_DICT, lambda decoder: ["dict"])
pushes(pickle.EMPTY_SET, lambda decoder: ["set"])
pushes(pickle.TUPLE1, lambda decoder: last_items(decoder, 1))
pushes(pickle.TUPLE2, lambda decoder: last_items(decoder, 2))
pushes(pickle.TUPLE3, lambda decoder: last_items(decoder, 3))
pushes(pickle.TUPLE, lambda decoder: ["tuple", *decoder.pop_to_mark()])
pushes(pickle.LIST, lambda decoder: ["list", *decoder.pop_to_mark()])


def last_items(decoder: Decoder, count: int) -> Node:
    """Make a tuple of the last `count` values."""
    items = [decoder.pop() for _ in range(count)]
    return ["tuple", *reversed(items)]


@on(pickle.PROTO)
def _protocol(decoder: Decoder) -> None:
    version = decoder.byte()
    if version > pickle.HIGHEST_PROTOCOL:
        raise ValueError(f"protocol {version}, expected at most {pickle.HIGHEST_PROTOCOL}")


@on(pickle.FRAME)
def _frame(decoder: Decoder) -> None:
    length = decoder.number(U8)
    if length > len(decoder.data) - decoder.place:
        raise ValueError(f"a frame of {length} bytes, which are missing")


@on(pickle.MARK)
def _mark(decoder: Decoder) -> None:
    decoder.below.append(decoder.stack)
    decoder.stack = []


@on(pickle.POP)
def _pop(decoder: Decoder) -> None:
    if decoder.stack:
        decoder.stack.pop()
    else:
        decoder.pop_to_mark()


@on(pickle.POP_MARK)
def _pop_mark(decoder: Decoder) -> None:
    decoder.pop_to_mark()


@on(pickle.DUP)
def _duplicate(decoder: Decoder) -> None:
    decoder.stack.append(decoder.top())


@on(pickle.PUT)
def _put(decoder: Decoder) -> None:
    decoder.memo[decimal(decoder.line())] = decoder.top()


@on(pickle.BINPUT)
def _put_short(decoder: Decoder) -> None:
    decoder.memo[decoder.byte()] = decoder.top()


@on(pickle.LONG_BINPUT)
def _put_long(decoder: Decoder) -> None:
    decoder.memo[decoder.number(U4)] = decoder.top()


@on(pickle.MEMOIZE)
def _memoize(decoder: Decoder) -> None:
    decoder.memo[len(decoder.memo)] = decoder.top()


@on(pickle.GET)
def _get(decoder: Decoder) -> None:
    decoder.recall(decimal(decoder.line()))


@on(pickle.BINGET)
def _get_short(decoder: Decoder) -> None:
    decoder.recall(decoder.byte())


@on(pickle.LONG_BINGET)
def _get_long(decoder: Decoder) -> None:
    decoder.recall(decoder.number(U4))


@on(pickle.APPEND)
def _append(decoder: Decoder) -> None:
    item = decoder.pop()
    require(decoder.top(), "list").append(item)


@on(pickle.APPENDS)
def _extend(decoder: Decoder) -> None:
    items = decoder.pop_to_mark()
    require(decoder.top(), "list").extend(items)


@on(pickle.DICT)
def _dict(decoder: Decoder) -> None:
    pairs = decoder.pop_to_mark()
    decoder.stack.append(["dict"])
    add_pairs(decoder.top(), pairs)


@on(pickle.SETITEM)
def _set_item(decoder: Decoder) -> None:
    value = decoder.pop()
    key = decoder.pop()
    add_pairs(decoder.top(), [key, value])


@on(pickle.SETITEMS)
def _set_items(decoder: Decoder) -> None:
    pairs = decoder.pop_to_mark()
    add_pairs(decoder.top(), pairs)


@on(pickle.ADDITEMS)
def _add_items(decoder: Decoder) -> None:
    items = decoder.pop_to_mark()
    for item in items:
        check_key(item)

    require(decoder.top(), "set").extend(items)


@on(pickle.FROZENSET)
def _frozenset(decoder: Decoder) -> None:
    items = decoder.pop_to_mark()
    for item in items:
        check_key(item)

    decoder.stack.append(["frozenset", *items])


@on(pickle.GLOBAL)
def _global(decoder: Decoder) -> None:
    module = decoder.line().decode("utf-8")
    name = decoder.line().decode("utf-8")
    decoder.stack.append(named(module, name))


@on(pickle.STACK_GLOBAL)
def _global_of_stack(decoder: Decoder) -> None:
    name = decoder.pop()
    module = decoder.pop()
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a name that is not text")

    decoder.stack.append(named(module, name))


@on(pickle.REDUCE)
def _reduce(decoder: Decoder) -> None:
    arguments = parts_of(decoder.pop(), "tuple")
    function = decoder.pop()
    if not isinstance(function, Name):
        raise ValueError("a call of something that is not a function")

    decoder.stack.append(function.call(decoder.space, *arguments))


@on(pickle.BUILD)
def _build(decoder: Decoder) -> None:
    state = decoder.pop()
    target = decoder.top()
    if isinstance(target, Dtype):
        set_dtype(target, state)

    elif isinstance(target, list) and target[0] == UNFINISHED:
        set_array(decoder.space, target, state)

    else:
        raise UnsafePickle("it sets the state of something other than a new array")


@on(pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX)
def _instance(decoder: Decoder) -> None:
    raise UnsafePickle("it makes an instance of a class")


@on(pickle.PERSID, pickle.BINPERSID, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
def _outside(decoder: Decoder) -> None:
    raise UnsafePickle("it refers to something outside itself")


@on(pickle.EXT1, pickle.EXT2, pickle.EXT4)
def _registered(decoder: Decoder) -> None:
    raise UnsafePickle("it names a class by number")
