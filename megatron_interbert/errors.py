"""One line for the user instead of a traceback: what is wrong, where, and the command that mends it."""

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from megatron_interbert.output import speak_any_language


class UsageError(ValueError):
    """Wrong flags, files or records. Entries print it as one line and exit with code 2."""


class Unreadable(UsageError):
    """Something is there and cannot be read now: permissions, disk, descriptors. It is not damaged."""


@contextlib.contextmanager
def local_errors() -> Iterator[None]:
    """Marks errors raised inside as known to this rank alone: it must speak, not rank 0."""
    try:
        yield
    except (UsageError, TrainingStopped) as error:
        error.local = True
        raise


class TrainingStopped(RuntimeError):
    """Work that began well and cannot go on (gradients stay non-finite, a checkpoint cannot be written). Exit code 1."""


PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the Slurm scripts queue the job again
INTERRUPTED = 128 + signal.SIGINT


class StoppedBySignal(Exception):
    """All ranks have ended for a signal, after saving where there is a --save.

    Exit code 75 for a run that has saved; otherwise, and after Ctrl-C, a shell's code of the signal.
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
    """Whether torch says that a GPU, or this machine, has no memory left."""
    said = ("out of memory", "can't allocate memory", "alloc_failed")
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or any(part in text for part in said)


NETWORK = (errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED, errno.ECONNABORTED)


def of_the_machine(error: BaseException) -> bool:
    """Whether it says that a file or the system has failed us, which no traceback explains better."""
    return isinstance(error, OSError) and bool(error.errno) and error.errno not in NETWORK


def run_entry(main: Callable[[], None]) -> None:
    """Run an entry point; our own errors become one line on stderr and exit code 2 (wrong use) or 1 (failed work).

    Every rank exits. The same error on all ranks is printed once on each machine, by its first rank, unless it carries
    `local = True` (a bad record that one rank alone has read).
    """
    speak_any_language()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except (UsageError, TrainingStopped) as error:
        rank = int(os.environ.get("RANK", "0"))
        code = 2 if isinstance(error, UsageError) else 1
        alone = getattr(error, "local", False)
        speaks = rank == 0 or os.environ.get("LOCAL_RANK") == "0" or alone
        if speaks:
            where = f" (rank {rank})" if rank else ""
            print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.stdout.flush()

        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not alone:
            # The other ranks are about to meet the same error; vanishing now would break a
            # collective of theirs. Who has spoken ends first: launchers then end the others.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
            time.sleep(1 if speaks else 5)
        # Not sys.exit: destructors of process groups and loader workers may wait for ranks that are
        # already gone.
        os._exit(code)
    except StoppedBySignal as reason:
        sys.stdout.flush()
        os._exit(reason.code)
    except OSError as error:
        if not of_the_machine(error):
            raise
        rank = os.environ.get("RANK", "0")
        where = f"{error.filename}: " if error.filename else ""
        print(f"error (rank {rank}): {where}{error.strerror}", file=sys.stderr, flush=True)
        os._exit(1)
    except RuntimeError as error:
        if out_of_memory(error):
            rank, text = os.environ.get("RANK", "0"), " ".join(str(error).split())
            print(
                f"error (rank {rank}): memory ran out ({text[:200]}); lower --micro-batch-size (or let"
                " auto choose it), add --recompute-activations, or share the model over more ranks"
                " (--zero-stage, --tensor-model-parallel-size); python tools/plan.py lists what fits",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        if not any(text in str(error) for text in ("Connection closed by peer", "Connection reset by peer")):
            raise
        print(
            f"rank {os.environ.get('RANK')}: lost the connection to another rank, which has ended;"
            " if no line says why, it was killed: did memory run out?",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(5)  # launchers report the first exit code they see: let it be that of the rank with the reason
        os._exit(1)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\ninterrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(INTERRUPTED)
