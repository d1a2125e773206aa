"""Run the decoding process: read pickles from standard input, write nodes to standard output.

It imports only Python's standard library, so that it starts in milliseconds and has little to
abuse.
"""

import json
import os
import signal
import sys

from megatron_interbert.preparation.building.pickles.confinement import confine
from megatron_interbert.preparation.building.pickles.decoder import Decoder
from megatron_interbert.preparation.building.pickles.measure import Measure
from megatron_interbert.preparation.building.pickles.nodes import (
    DAMAGED,
    READY,
    REPLY,
    REQUEST,
    UNSAFE,
    VALUE,
    UnsafePickle,
)

TOO_LARGE = (DAMAGED, b"needs too much memory", b"")  # built now, as memory is gone when needed


def answer(data: bytes) -> tuple[int, bytes, bytes | bytearray]:
    """Decode one pickle; return (VALUE, JSON, tail), or (DAMAGED or UNSAFE, reason, nothing)."""
    try:
        decoder = Decoder(data)
        node = decoder.decode()
        Measure(len(data)).check(node)
        return VALUE, json.dumps(node, separators=(",", ":")).encode(), decoder.space.tail

    except UnsafePickle as error:
        return UNSAFE, str(error).encode("utf-8", "backslashreplace"), b""

    except MemoryError:
        return TOO_LARGE

    except Exception as error:  # a damaged pickle may raise anything
        reason = f"{type(error).__name__}: {error}"[:300]
        return DAMAGED, reason.encode("utf-8", "backslashreplace"), b""


def serve(seconds: int, memory: int) -> None:
    """Confine this process to `memory` bytes, then answer requests until the input ends.

    An alarm kills it if an answer takes longer than `seconds`.
    """
    source = open(0, "rb")
    sink = open(1, "wb")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reader; this one ends with it
    confine(memory)
    sink.write(READY)
    sink.flush()

    while header := source.read(REQUEST.size):
        data = source.read(*REQUEST.unpack(header))
        signal.alarm(seconds)
        kind, text, tail = answer(data)
        signal.alarm(0)

        sink.write(REPLY.pack(kind, len(text), len(tail)))
        sink.write(text)
        sink.write(tail)
        sink.flush()


def main() -> None:
    """Serve with the limits on the command line: seconds per pickle, bytes of memory."""
    try:
        serve(int(sys.argv[1]), int(sys.argv[2]))
    finally:
        os._exit(0)  # Python's normal exit needs system calls that are refused
