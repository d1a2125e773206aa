"""The process that decodes: pickles come in on standard input, nodes go out.

Imports nothing but Python's own library, so that it starts in milliseconds and has little to abuse.
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

TOO_LARGE = (DAMAGED, b"needs too much memory", b"")  # ready: there is no memory to make it then


def answer(data: bytes) -> tuple[int, bytes, bytes | bytearray]:
    """Decode one pickle: (VALUE, JSON, tail), or (DAMAGED or UNSAFE, reason, nothing)."""
    try:
        decoder = Decoder(data)
        node = decoder.decode()
        Measure(len(data)).check(node)
        return VALUE, json.dumps(node, separators=(",", ":")).encode(), decoder.space.tail

    except UnsafePickle as error:
        return UNSAFE, str(error).encode("utf-8", "backslashreplace"), b""

    except MemoryError:
        return TOO_LARGE

    except Exception as error:  # what a damaged pickle raises tells what is wrong with it
        reason = f"{type(error).__name__}: {error}"[:300]
        return DAMAGED, reason.encode("utf-8", "backslashreplace"), b""


def serve(seconds: int, memory: int) -> None:
    """Confine this process, then answer until the input ends.

    It dies over an answer that takes `seconds`.
    """
    source = open(0, "rb")
    sink = open(1, "wb")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reader, whose end ends this
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
    """Serve with the limits of the command line: seconds, bytes of memory."""
    try:
        serve(int(sys.argv[1]), int(sys.argv[2]))
    finally:
        os._exit(0)  # Python's own end would ask for what is refused
