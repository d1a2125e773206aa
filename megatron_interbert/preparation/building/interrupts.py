"""Ctrl-C while worker processes run: they ignore it, and this process stops between two steps."""

import contextlib
import signal
from collections.abc import Callable, Iterator

LOOK = 0.2  # seconds between two looks at whether Ctrl-C was pressed


@contextlib.contextmanager
def keeping_interrupts() -> Iterator[Callable[[], None]]:
    """Keep Ctrl-C until the function that is given is called, which raises KeyboardInterrupt then.

    Raised anywhere else it may be lost, or leave a queue between processes half-made.
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
    """Start processes inside that ignore Ctrl-C from their first moment on; here it waits until the
    end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
