"""Share the work in a folder among processes on any machines that see it, without messages between
them: what one of them takes, the others leave; what a dead one has taken is taken again.

    FOLDER/alive-NAME       of each process; touched all the time while it lives
           WHAT.claim       the name of the process that has taken WHAT

Two processes may work on the same thing after a pause longer than `timeout`. That costs time only:
each writes under temporary names of its own, and the bytes are the same from anyone.
"""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from megatron_interbert.parallel.launch import node_name, read_launch

ALIVE = "alive-"
CLAIM = ".claim"
OURS = (f"{ALIVE}*", f"*{CLAIM}", f"*{CLAIM}.*.new")
PAUSE = 1.0  # seconds between two looks at what others have done
TOUCH = 1.0  # seconds between two signs of life
TIMEOUT = 60.0  # seconds without one after which a process counts as dead


@dataclass(frozen=True)
class Team:
    """Hold this process's place among those that a launcher has started for one command."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    timeout: float = TIMEOUT  # seconds without a sign of life after which others take its work

    @property
    def is_first(self) -> bool:
        """Check whether this is the process that reports."""
        return self.rank == 0

    @property
    def is_shared(self) -> bool:
        """Check whether there are other processes."""
        return self.size > 1

    def of_machines(self) -> "Team":
        """Return the place of this process among the first ones of all machines."""
        machines = -(-self.size // self.local_size)
        return replace(
            self, rank=self.rank // self.local_size, size=machines, local_rank=0, local_size=1
        )

    def has_made(self, path: Path) -> bool:
        """Check whether a file is newer than the launcher of this process, so that others of the
        team have made it.
        """
        try:
            launched = psutil.Process(os.getppid()).create_time()
            return self.is_shared and path.stat().st_mtime > launched
        except (OSError, psutil.Error):
            return False

    def share_of(self, processes: int) -> int:
        """Return how many of the processes that a machine is to run are this one's."""
        return max(processes // self.local_size, 1)


ALONE = Team()


def read_team(timeout: float = TIMEOUT) -> Team:
    """Read this process's place from what torchrun, deepspeed or srun have set."""
    launch = read_launch()
    return Team(launch.rank, launch.world_size, launch.local_rank, launch.local_size, timeout)


class WorkIsOver(Exception):
    """Report that the folder has gone: another process has finished the work."""


class Claims:
    """Claim pieces of work in a folder, so that other processes leave them alone."""

    def __init__(self, folder: Path, team: Team = ALONE) -> None:
        self.folder = folder
        self.team = team
        self.name = f"{node_name()}-{os.getpid()}-{time.time_ns():x}"
        self._alive = folder / f"{ALIVE}{self.name}"
        self._ended = threading.Event()
        self._seen: dict[str, tuple[float, float]] = {}  # owner: (last sign of life, when seen)

    def __enter__(self) -> "Claims":
        with self._work_may_be_over():
            self._alive.write_text(_system(), encoding="utf-8")
            self.began = self._alive.stat().st_mtime  # by the clock of the disk
        threading.Thread(target=self._live, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._alive.unlink()

    def _live(self) -> None:
        while not self._ended.wait(TOUCH):
            with contextlib.suppress(OSError):  # the folder gets another name when all is done
                os.utime(self._alive)

    @contextlib.contextmanager
    def _work_may_be_over(self) -> Iterator[None]:
        """Turn the error of a folder that has gone into WorkIsOver."""
        try:
            yield
        except FileNotFoundError as error:
            if self.folder.exists():
                raise
            raise WorkIsOver(str(self.folder)) from error

    def take(self, what: str) -> bool:
        """Claim something unless a living process has it; return whether this process has it now.

        Raises WorkIsOver if the folder has gone.
        """
        with self._work_may_be_over():
            path = self.folder / (what + CLAIM)
            owner = _owner_of(path)
            if owner == self.name:
                return True
            if owner is not None and self._lives(owner):
                return False

            self._write(path, first=owner is None)

            return _owner_of(path) == self.name

    def _write(self, path: Path, first: bool) -> None:
        """Write the name of this process into a claim; as the `first`, if no other one does."""
        own = path.with_name(f"{path.name}.{self.name}.new")
        own.write_text(self.name, encoding="utf-8")
        try:
            if first:
                os.link(own, path)
            else:
                os.replace(own, path)
        except FileExistsError:
            pass
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links: the last one to write has it
            os.replace(own, path)
        finally:
            own.unlink(missing_ok=True)

    def release(self, what: str) -> None:
        """Give something back, unless others have taken it meanwhile."""
        path = self.folder / (what + CLAIM)
        if _owner_of(path) == self.name:
            path.unlink(missing_ok=True)

    def _lives(self, owner: str) -> bool:
        """Check whether a process has given a sign of life within the timeout, by this machine's
        clock: those of other machines may differ.
        """
        try:
            with open(self.folder / f"{ALIVE}{owner}", "rb") as handle:  # opening asks the server
                sign = os.fstat(handle.fileno()).st_mtime
                system = handle.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return False

        if system == _system() and not _is_running(int(owner.rsplit("-", 2)[1])):
            return False

        last, when = self._seen.get(owner, (None, 0.0))
        if sign != last:
            self._seen[owner] = sign, time.monotonic()
            return True

        return time.monotonic() - when < self.team.timeout


def _owner_of(path: Path) -> str | None:
    """Return the process that has a claim; None if there is none. An empty claim, left by a power
    failure, is that of a process without a sign of life.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


@functools.cache
def _system() -> str:
    """Return what is the same for two processes only if both see each other's process numbers: the
    start of the machine and the namespace.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    try:
        return f"{boot.read_text().strip()} {space.stat().st_ino} {node_name()}"
    except OSError:
        return f"unknown {os.getpid()} {time.time_ns()}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass

    return True


def in_turn(items: Sequence[Any], team: Team) -> list[Any]:
    """Return items from the share of this process on, so that few processes ask for the same."""
    first = len(items) * team.rank // team.size
    return [*items[first:], *items[:first]]
