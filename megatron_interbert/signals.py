"""Signals between the processes of a run."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

# They ask a run to save and end: a machine is about to be taken away, or a terminal or the launcher of a node has gone.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def take_over(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> None:
    """`handler` answers these signals from now on, but for those that were to be ignored (SIGHUP under nohup)."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def identity(pid: int) -> str:
    """Tells a process from all others, on whatever machine, in whatever container and before or after it; empty when it is gone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {started}"
    except OSError:
        return ""


def signal_at_parents_death(number: int) -> None:
    """From now on this process gets a signal when its parent dies, however it dies. Does nothing where there is no Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
