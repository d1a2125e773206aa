"""Share the work in a folder among processes on any machines that see it, without messages between
them: what one of them takes, the others leave; what a dead one has taken is taken again.

    FOLDER/alive-NAME       of each process; touched all the time while it lives
           WHAT.claim       the name of the process that has taken WHAT

Two processes may work on the same thing after a pause longer than `timeout`. That costs time only:
everything is written under a temporary name of its process, and has the same bytes from anyone.
"""

import contextlib
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_interbert.parallel.launch import node_name, read_launch

ALIVE = "alive-"
CLAIM = ".claim"
OURS = (f"{ALIVE}*", f"*{CLAIM}", f"*{CLAIM}.*.new")
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

    def share_of(self, processes: int) -> int:
        """Return how many of the processes that a machine is to run are this one's."""
        return max(processes // self.local_size, 1)


ALONE = Team()


def read_team(timeout: float = TIMEOUT) -> Team:
    """Read this process's place from what torchrun, deepspeed or srun have set."""
    launch = read_launch()
    return Team(launch.rank, launch.world_size, launch.local_rank, launch.local_size, timeout)


class Claims:
    """Take things in a folder for this process, as a context manager."""

    def __init__(self, folder: Path, team: Team = ALONE) -> None:
        self.folder = folder
        self.team = team
        self.name = f"{node_name()}-{os.getpid()}-{time.time_ns():x}"
        self._alive = folder / f"{ALIVE}{self.name}"
        self._ended = threading.Event()
        self._seen: dict[str, tuple[float, float]] = {}  # owner: (last sign of life, when seen)

    def __enter__(self) -> "Claims":
        self._alive.touch()
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

    def take(self, what: str) -> bool:
        """Take something unless a living process has it; return whether this process has it now."""
        path = self.folder / (what + CLAIM)
        try:
            owner = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            owner = ""

        if owner == self.name:
            return True
        if owner and self._lives(owner):
            return False

        self._write(path, first=not owner)

        return path.read_text(encoding="utf-8") == self.name

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
        except OSError:  # a file system without links: the last one to write has it
            os.replace(own, path)
        finally:
            own.unlink(missing_ok=True)

    def release(self, what: str) -> None:
        """Give something back."""
        (self.folder / (what + CLAIM)).unlink(missing_ok=True)

    def _lives(self, owner: str) -> bool:
        """Check whether a process has given a sign of life within the timeout, by this machine's
        clock: those of other machines may differ.
        """
        try:
            with open(self.folder / f"{ALIVE}{owner}", "rb") as handle:  # opening asks the server
                sign = os.fstat(handle.fileno()).st_mtime
        except FileNotFoundError:
            return False

        host, number, _ = owner.rsplit("-", 2)
        if host == node_name() and not _is_running(int(number)):
            return False

        last, when = self._seen.get(owner, (None, 0.0))
        if sign != last:
            self._seen[owner] = sign, time.monotonic()
            return True

        return time.monotonic() - when < self.team.timeout


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass

    return True
