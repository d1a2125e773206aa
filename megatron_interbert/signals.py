"""Handle signals between the processes of a run."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType

# Signals that ask a run to save and end: the machine is about to be taken away, or the terminal or
# the node's launcher is gone.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
EXIT_STATUS = 49  # field of /proc/PID/stat, counted from the process's state
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def handle_signals(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]
) -> None:
    """Install `handler` for these signals, except those that are ignored (SIGHUP under nohup)."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def handling(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handle these signals by `handler` for a while, then as before; call it in the main thread."""
    before = {number: signal.getsignal(number) for number in numbers}
    handle_signals(before, handler)

    try:
        yield
    finally:
        for number, earlier in before.items():
            if earlier is not None:  # a handler that Python did not set, and cannot set again
                signal.signal(number, earlier)


def killed_by(number: int) -> str:
    """Describe the signal that killed a process, and what it most likely means."""
    name = signal.Signals(number).name
    return f"killed by {name}" + (" (memory ran out?)" if number == signal.SIGKILL else "")


def identity(pid: int) -> str:
    """Return a text unique to a process across machines, containers and time; empty if it is
    gone.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {started}"
    except OSError:
        return ""


def exit_status(pid: int, name: str, patience: float = 0.5) -> int | None:
    """Read the exit status of a process that is ending, before its parent has collected it.

    Returns its exit code, or minus the signal that killed it; None if unknown: it is not on this
    machine (`name` is its identity), does not end within `patience` seconds, or was collected.
    """
    deadline = time.monotonic() + patience

    while name and identity(pid) == name:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
            status = int(fields[EXIT_STATUS])
            if fields[0] == "Z" or status:
                return -(status & 0x7F) if status & 0x7F else status >> 8

        if time.monotonic() > deadline:
            break

        time.sleep(0.01)

    return None


def signal_at_parents_death(number: int) -> None:
    """Have the kernel send this process a signal when its parent dies, however it dies.

    Does nothing on systems other than Linux.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
