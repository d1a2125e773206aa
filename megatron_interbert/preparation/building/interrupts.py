"""Handle Ctrl-C while worker processes run: they ignore it, this process stops between steps."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

LOOK = 0.2  # seconds between two checks whether Ctrl-C was pressed


@contextlib.contextmanager
def keeping_interrupts() -> Iterator[Callable[[], None]]:
    """Hold back Ctrl-C until the yielded function is called, which then raises KeyboardInterrupt.

    Raised anywhere else, it may be lost, or leave a queue between processes half built.
    """
    heard: list[int] = []

    def check() -> None:
        if heard:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C: processes started inside ignore it from their first moment, and this process
    receives it at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Let this process of a pool end when its parent does: it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
