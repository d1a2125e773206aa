"""Report errors in one line instead of a traceback: what is wrong, where, and how to fix it."""

import atexit
import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from megatron_interbert.output import (
    keep_speaking,
    open_standard_streams,
    say_what_was_lost,
    speak_any_language,
)


class RunError(Exception):
    """Represent an error that entry points print as one line instead of a traceback.

    A `local` error is known to this rank alone, which therefore prints it instead of rank 0.
    """

    local = False


class UsageError(RunError, ValueError):
    """Represent wrong flags, files or records; exit code 2."""


class Unreadable(UsageError):
    """Represent something that exists but cannot be read now: permissions, disk, descriptors.

    It need not be damaged.
    """


@contextlib.contextmanager
def local_errors() -> Iterator[None]:
    """Mark errors raised in this context as known to this rank alone."""
    try:
        yield
    except RunError as error:
        error.local = True
        raise


@contextlib.contextmanager
def imports_of(extra: str, what: str) -> Iterator[None]:
    """Import optional packages in this context; raises UsageError naming the `extra` to install if
    one that `what` needs is missing or broken.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("megatron_interbert"):
            raise
        raise UsageError(
            f"{what} needs {error.name or error}: pip install 'megatron_interbert[{extra}]'"
        ) from error


class TrainingStopped(RunError, RuntimeError):
    """Represent work that began well and cannot continue; exit code 1.

    For example, gradients stay non-finite, or a checkpoint cannot be written.
    """


PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the Slurm scripts requeue the job
INTERRUPTED = 128 + signal.SIGINT


class StoppedBySignal(Exception):
    """Represent the end of all ranks on a signal, after saving if --save is given.

    The exit code is 75 for a run that has saved; otherwise, and after Ctrl-C, 128 + the signal's
    number, as in a shell.
    """

    def __init__(self, number: int, saved: bool) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = PREEMPTED if saved and number != signal.SIGINT else 128 + number


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """End the process on a signal when nothing needs saving: before a run has begun, or when all
    finished work is on disk.

    Skips Python's shutdown, because a second signal may arrive at any moment.
    """
    name = signal.Signals(number).name
    os.write(2, f"{name}: ended; the same command starts again or resumes\n".encode())
    os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)


def out_of_memory(error: BaseException) -> bool:
    """Check whether torch reports that a GPU, or this machine, is out of memory."""
    said = ("out of memory", "can't allocate memory", "alloc_failed")
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or any(part in text for part in said)


NETWORK = (errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED, errno.ECONNABORTED)


def of_the_machine(error: BaseException) -> bool:
    """Check whether a file or the system has failed, which a traceback would not explain better.

    Broken network connections do not count.
    """
    return isinstance(error, OSError) and bool(error.errno) and error.errno not in NETWORK


def number_of(variable: str, default: int) -> int:
    """Return the number in an environment variable, or the default if it is not a number
    (parallel/launch.py rejects it).
    """
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else default


def begin_entry() -> None:
    """Make standard streams that never fail, and let Ctrl-C raise KeyboardInterrupt again."""
    open_standard_streams()
    speak_any_language()
    keep_speaking()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


ENDING = threading.Event()  # set when an error is about to end this process
_last_actions: list[Callable[[], None]] = []


def at_end(action: Callable[[], None]) -> None:
    """Have `action()` called when the process ends, by `end_entry` too; not if it is killed."""
    _last_actions.append(action)
    atexit.register(action)


def end_entry(code: int) -> NoReturn:
    """End the process with an exit code, skipping destructors of process groups and loader workers:
    they may wait for ranks that are already gone.
    """
    say_what_was_lost()
    for action in _last_actions:
        with contextlib.suppress(OSError):
            action()

    os._exit(code)


def end_report(reports: bool) -> None:
    """Report lost lines of standard output; end with code 1 if it held the result."""
    if say_what_was_lost() and reports:
        os._exit(1)


def end_rank() -> None:
    """End one of several ranks, whose work is done, as Python would, but without destructors: those
    of process groups may abort. Does nothing in a single process.
    """
    if number_of("WORLD_SIZE", 1) == 1:
        return

    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)


def say_error(text: str) -> None:
    """Print an error to stderr as one line, with the rank unless it is 0."""
    rank = os.environ.get("RANK", "") if number_of("WORLD_SIZE", 1) > 1 else ""
    where = f" (rank {rank})" if rank not in ("", "0") else ""
    print(f"error{where}: {' '.join(text.split())}", file=sys.stderr, flush=True)


def run_entry(main: Callable[[], None], reports: bool = False) -> None:
    """Run an entry point; our own errors become one line on stderr and exit code 2 (wrong use) or 1
    (failed work).

    An entry point that `reports` writes its result to standard output: exit code 1 if that failed.

    Every rank exits. An error is printed once on each machine, by its first rank; one with
    `local = True` (a bad record that one rank alone has read) by the rank that raised it.
    """
    begin_entry()

    try:
        main()
    except RunError as error:
        end_for(error, 2 if isinstance(error, UsageError) else 1)
    except StoppedBySignal as reason:
        end_entry(reason.code)
    except OSError as error:
        if not of_the_machine(error):
            raise
        where = f"{error.filename}: " if error.filename else ""
        say_error(f"{where}{error.strerror}")
        end_entry(1)
    except RuntimeError as error:
        end_for_runtime_error(error)
    except KeyboardInterrupt:
        if number_of("RANK", 0) == 0:
            print("\ninterrupted", file=sys.stderr, flush=True)
        end_entry(INTERRUPTED)
    except SystemExit as end:
        end_report(reports)
        if not end.code:
            end_rank()
        raise

    end_report(reports)
    end_rank()


def end_for(error: RunError, code: int) -> NoReturn:
    """Print an error, on one rank of each machine or on the rank that alone knows it, and end."""
    ENDING.set()
    alone = error.local
    speaks = number_of("RANK", 0) == 0 or os.environ.get("LOCAL_RANK") == "0" or alone
    if speaks:
        say_error(str(error))

    sys.stdout.flush()
    if number_of("WORLD_SIZE", 1) > 1 and not alone:
        # The other ranks are about to meet the same error, and exiting now would break one of
        # their collectives. The rank that printed it exits first; launchers then end the others.
        signal.signal(signal.SIGTERM, lambda *_: end_entry(code))
        time.sleep(1 if speaks else 5)

    end_entry(code)


def end_for_runtime_error(error: RuntimeError) -> NoReturn:
    """Report in one line that memory ran out or another rank is gone; re-raise anything else."""
    if out_of_memory(error):
        say_error(
            f"memory ran out ({' '.join(str(error).split())[:200]}); lower --micro-batch-size (or"
            " let auto choose it), add --recompute-activations, or split the model over more ranks"
            " (--zero-stage, --tensor-model-parallel-size); interbert plan lists what fits"
        )
        end_entry(1)

    lost = ("Connection closed by peer", "Connection reset by peer")
    if not any(text in str(error) for text in lost):
        raise error

    print(
        f"rank {os.environ.get('RANK')}: lost the connection to another rank, which has ended;"
        " if no line says why, it was killed, perhaps for lack of memory",
        file=sys.stderr,
        flush=True,
    )
    # launchers report the first exit code they see: it should be that of the rank that failed
    time.sleep(5)
    end_entry(1)
