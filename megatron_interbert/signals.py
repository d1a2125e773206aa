"""Signals between the processes of a run."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

# They ask a run to save and end: a machine is about to be taken away, or a terminal or the launcher
# of a node has gone.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
EXIT_STATUS = 49  # of /proc/PID/stat, counted from the process's state
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def handle_signals(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]
) -> None:
    """`handler` answers these signals from now on, but for those that were to be ignored (SIGHUP
    under nohup).
    """
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def killed_by(number: int) -> str:
    """Say in words which signal has killed a process, and what that mostly means."""
    name = signal.Signals(number).name
    return f"killed by {name}" + (" (memory ran out?)" if number == signal.SIGKILL else "")


def identity(pid: int) -> str:
    """Tell a process from all others, on whatever machine, in whatever container and before or
    after it; empty when it is gone.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {started}"
    except OSError:
        return ""


def exit_status(pid: int, name: str, patience: float = 0.5) -> int | None:
    """Read how a process that is ending will have ended, before its parent has taken note of it.

    Its exit code, or minus the signal that has killed it; None where that cannot be known: it is
    not of this machine (`name` is its identity), or its parent was faster.
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
    """From now on this process gets a signal when its parent dies, however it dies.

    Does nothing where there is no Linux.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
