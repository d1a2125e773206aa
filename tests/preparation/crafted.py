"""Craft pickles that no honest program writes, and some that only old programs write."""

import struct

import numpy as np
from numpy._core.multiarray import _reconstruct, scalar
from numpy._core.numeric import _frombuffer

POINTERS = b"\x41" * 8  # eight bytes that NumPy would take for the address of an object


class Call:
    """Represent what is pickled as the call of a function, and a state that its result is given."""

    def __init__(self, function, arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def dtype_call(code, *state):
    """Return a dtype with a state: order, subtype, names, fields, size, alignment, flags."""
    return Call(np.dtype, (code, False, True), (3, *state))


def array_call(dtype, shape=(1,), data=POINTERS):
    return Call(_reconstruct, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, data))


OBJECTS = ("|", None, None, None, -1, -1, 63)
HONEST = dtype_call("O8", *OBJECTS)
# A record of an object that claims to have none, objects that claim to be none, numbers made into
# a record.
RECORD = dtype_call("V8", "|", None, ("a",), {"a": (HONEST, 0)}, 8, 1, 0)
DISGUISED = dtype_call("O8", "|", None, None, None, -1, -1, 0)
NUMBERS = dtype_call("f8", "<", None, ("a",), {"a": (HONEST, 0)}, 8, 1, 0)


def with_pointers():
    """Return values by name whose data NumPy would take for addresses of objects."""
    return {
        "record of an object": array_call(RECORD),
        "objects said to be none": array_call(DISGUISED),
        "objects in a buffer": Call(_frombuffer, (bytearray(POINTERS), DISGUISED, (1,), "C")),
        "records in a buffer": Call(_frombuffer, (bytearray(POINTERS), RECORD, (1,), "C")),
        "scalar of an object": Call(scalar, (DISGUISED, POINTERS)),
        "numbers made into a record": array_call(NUMBERS),
    }


def python_2(array, protocol):
    """Return a pickled dictionary {"features": array, "n": 5} as Python 2 wrote it."""
    data = array.tobytes()
    order = array.dtype.str[0].encode()
    code = array.dtype.str[1:].encode()
    size, alignment = (array.itemsize, 1) if code.startswith(b"S") else (-1, -1)

    if protocol == 0:
        shape = b"".join(b"I%d\n" % length for length in array.shape)
        return (
            b"(dp0\nS'features'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n"
            b"(cnumpy\nndarray\np3\n(I0\ntp4\nS'b'\np5\ntp6\nRp7\n(I1\n(%stp8\ncnumpy\n"
            b"dtype\np9\n(S'%s'\np10\nI0\nI1\n"
            b"tp11\nRp12\n(I3\nS'%s'\np13\nNNNI%d\nI%d\nI0\ntp14\nbI00\nS%s\np15\n"
            b"tp16\nbsS'n'\np17\nL5L\ns."
            % (shape, code, order, size, alignment, repr(data)[1:].encode())
        )

    shape = b"".join(b"K" + bytes([length]) for length in array.shape)
    length = len(data).to_bytes(4, "little")

    return (
        (b"\x80\x02" if protocol == 2 else b"")
        + b"}q\x00(U\x08featuresq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02"
        + b"(cnumpy\nndarray\nq\x03(K\x00tq\x04U\x01bq\x05tq\x06Rq\x07"
        + b"(K\x01("
        + shape
        + b"tq\x08cnumpy\ndtype\nq\x09(U"
        + bytes([len(code)])
        + code
        + b"q\x0aK\x00K\x01tq\x0bRq\x0c(K\x03U\x01"
        + order
        + b"q\x0dNNN"
        + struct.pack("<cici", b"J", size, b"J", alignment)
        + b"K\x00tq\x0ebI00\nT"
        + length
        + data
        + b"q\x0ftq\x10bU\x01nq\x11K\x05u."
    )
