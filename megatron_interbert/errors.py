"""One line for the user instead of a traceback: what is wrong, where, and the command that mends
it.
"""

import contextlib
import errno
import os
import signal
import sys
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
    """An error of ours: entries print it as one line instead of a traceback.

    One that is `local` is known to this rank alone, so this rank must speak, not rank 0.
    """

    local = False


class UsageError(RunError, ValueError):
    """Wrong flags, files or records; exit code 2."""


class Unreadable(UsageError):
    """Something is there and cannot be read now: permissions, disk, descriptors.

    That does not mean that it is damaged.
    """


@contextlib.contextmanager
def local_errors() -> Iterator[None]:
    """Mark errors raised inside as known to this rank alone."""
    try:
        yield
    except RunError as error:
        error.local = True
        raise


class TrainingStopped(RunError, RuntimeError):
    """Work that began well and cannot continue; exit code 1.

    Gradients stay non-finite, or a checkpoint cannot be written.
    """


PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the Slurm scripts queue the job again
INTERRUPTED = 128 + signal.SIGINT


class StoppedBySignal(Exception):
    """All ranks have ended for a signal, after saving where there is a --save.

    Exit code 75 for a run that has saved; otherwise, and after Ctrl-C, a shell's code of the
    signal.
    """

    def __init__(self, number: int, saved: bool) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = PREEMPTED if saved and number != signal.SIGINT else 128 + number


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """Answer a signal where nothing needs to be saved: before a run has begun, or where all that is
    finished lies on disk.

    It goes past Python's own end, for a second signal may come at any moment.
    """
    name = signal.Signals(number).name
    os.write(2, f"{name}: ended; the same command starts again or resumes\n".encode())
    os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)


def out_of_memory(error: BaseException) -> bool:
    """Tell whether torch says that a GPU, or this machine, has no memory left."""
    said = ("out of memory", "can't allocate memory", "alloc_failed")
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or any(part in text for part in said)


NETWORK = (errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED, errno.ECONNABORTED)


def of_the_machine(error: BaseException) -> bool:
    """Tell whether it says that a file or the system has failed us, which no traceback explains
    better.
    """
    return isinstance(error, OSError) and bool(error.errno) and error.errno not in NETWORK


def number_of(variable: str, default: int) -> int:
    """Read a number from the environment; the default where it is none (parallel/launch.py refuses
    it).
    """
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else default


def begin_entry() -> None:
    """Prepare the process for work that neither its standard streams nor a signal may cut short."""
    open_standard_streams()
    speak_any_language()
    keep_speaking()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_entry(code: int) -> NoReturn:
    """End the process with an exit code, past destructors of process groups and loader workers:
    they may wait for ranks that are already gone.
    """
    say_what_was_lost()
    os._exit(code)


def end_report(reports: bool) -> None:
    """Say what standard output has lost; end with code 1 where it was the result."""
    if say_what_was_lost() and reports:
        os._exit(1)


def say_error(text: str) -> None:
    """Print one line for the user, with the rank where there are several."""
    rank = os.environ.get("RANK", "") if number_of("WORLD_SIZE", 1) > 1 else ""
    where = f" (rank {rank})" if rank not in ("", "0") else ""
    print(f"error{where}: {' '.join(text.split())}", file=sys.stderr, flush=True)


def run_entry(main: Callable[[], None], reports: bool = False) -> None:
    """Run an entry point; our own errors become one line on stderr and exit code 2 (wrong use) or 1
    (failed work).

    One that `reports` has its result on standard output: code 1 where that could not be written.

    Every rank exits. The same error on all ranks is printed once on each machine, by its first
    rank, unless it carries `local = True` (a bad record that one rank alone has read).
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
    except SystemExit:
        end_report(reports)
        raise

    end_report(reports)


def end_for(error: RunError, code: int) -> NoReturn:
    """Say what is wrong, on one rank of each machine, and end."""
    alone = error.local
    speaks = number_of("RANK", 0) == 0 or os.environ.get("LOCAL_RANK") == "0" or alone
    if speaks:
        say_error(str(error))

    sys.stdout.flush()
    if number_of("WORLD_SIZE", 1) > 1 and not alone:
        # The other ranks are about to meet the same error; vanishing now would break a collective
        # of theirs. Who has spoken ends first: launchers then end the others.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(1 if speaks else 5)

    end_entry(code)


def end_for_runtime_error(error: RuntimeError) -> NoReturn:
    """Say in a line that memory ran out, or that another rank has gone; raise what is neither."""
    if out_of_memory(error):
        say_error(
            f"memory ran out ({' '.join(str(error).split())[:200]}); lower --micro-batch-size (or"
            " let auto choose it), add --recompute-activations, or share the model over more ranks"
            " (--zero-stage, --tensor-model-parallel-size); python tools/plan.py lists what fits"
        )
        end_entry(1)

    lost = ("Connection closed by peer", "Connection reset by peer")
    if not any(text in str(error) for text in lost):
        raise error

    print(
        f"rank {os.environ.get('RANK')}: lost the connection to another rank, which has ended;"
        " if no line says why, it was killed: did memory run out?",
        file=sys.stderr,
        flush=True,
    )
    # launchers report the first exit code they see: let it be that of the rank with the reason
    time.sleep(5)
    end_entry(1)
