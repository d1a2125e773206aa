"""The folder --save of a run: its lock, the names in it, how checkpoints are published and
removed.
"""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_interbert.errors import UsageError
from megatron_interbert.files import open_lock, point_to, publish_folder, take_lock, write_text
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.reading import is_there, list_folder
from megatron_interbert.weights.manifest import (
    BEST,
    MANIFEST,
    STEP_FOLDER,
    complete_checkpoints,
    of_right_size,
    verify,
)

LOCK = ".lock"
PARTIAL = ".partial"
DAMAGED = "damaged-"
POINTER = "latest"  # a file that names the newest checkpoint
MEGATRON_POINTER = "latest_checkpointed_iteration.txt"


@dataclass
class Claim:
    """What rank 0 holds of a run's --save; the other ranks hold nothing."""

    handle: int | None = None  # of the lock file; open as long as the run lives
    locked: bool = False  # only who has the lock may rename or remove what is not its own


def claim_folder(folder: str, state: ParallelState) -> Claim:
    """Lock --save for this run, on rank 0; UsageError on all ranks when another run holds it."""
    claim = Claim()
    problem = None

    if folder and state.is_main:
        try:
            claim = lock_folder(Path(folder))
        except UsageError as error:
            problem = str(error)

    problem = state.gather(problem)[0]
    if problem:
        raise UsageError(problem)

    return claim


def renewed(claim: Claim, folder: Path) -> Claim:
    """Give a claim that holds for a folder as it is now: somebody may have removed it, and its
    lock.

    UsageError where another run has taken it since.
    """
    if claim.handle is None:
        return claim

    try:
        there = os.stat(folder / LOCK)
        ours = os.fstat(claim.handle)
        if os.path.samestat(there, ours):
            return claim
    except FileNotFoundError:
        pass

    return lock_folder(folder)


def lock_folder(folder: Path) -> Claim:
    """Make the folder and take its lock, one of the process: workers forked later do not inherit
    it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open_lock(folder / LOCK)
    except OSError as error:
        raise UsageError(
            f"--save {folder}: nothing can be written there ({error.strerror}); choose another"
            " folder"
        ) from error

    try:
        taken = take_lock(handle, of_process=True)
    except OSError as error:
        print(
            f"note: --save {folder} cannot be locked ({error.strerror}): nothing that lies there is"
            " renamed or cleaned up by this run; see that no other run writes there",
            flush=True,
        )
        return Claim(handle)

    if not taken:
        holder = " ".join(os.pread(handle, 200, 0).decode("utf-8", "replace").split())
        raise UsageError(
            f"--save {folder}: another run writes there ({holder}); end that process (SIGTERM: it"
            " saves first), or choose another --save"
        )

    with contextlib.suppress(OSError):  # a full disk: the name is only for people
        # A backup by hard links shares this file, or somebody has planted it.
        if os.fstat(handle).st_nlink > 1:
            return Claim(handle, locked=True)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    return Claim(handle, locked=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a run has left that was killed while it wrote."""
    for name in list_folder(folder):
        if name.startswith(f".{STEP_FOLDER}") and name.endswith(PARTIAL):
            shutil.rmtree(folder / name, ignore_errors=True)


def set_aside(path: Path) -> None:
    """Give a folder a name under which nothing takes it for a checkpoint.

    UsageError where it cannot be.
    """
    try:
        os.rename(path, path.with_name(f"{DAMAGED}{path.name}-{time.time_ns()}"))
    except OSError as error:
        raise UsageError(f"{path}: damaged, and cannot be set aside ({error.strerror})") from error


def partial_folder(final: Path, token: str = "") -> Path:
    """Where a checkpoint grows before it is renamed, and where it goes to be removed.

    `token` keeps two runs apart that write to one folder where there are no locks.
    """
    return final.with_name(f".{final.name}{token and '.'}{token}{PARTIAL}")


class RunFolder:
    """The folder as one run sees it. Rank 0 publishes, moves the pointers and removes.

    `token` is the run's own, in the names of what it has not finished; `tell` hears of what fails
    after a checkpoint has been committed.
    """

    def __init__(self, path: Path, claim: Claim, token: str, tell: Callable[[str], None]) -> None:
        self.path = path
        self._claim = claim  # held open: it keeps other runs out
        self._token = token
        self._tell = tell
        self._ours: set[str] = set()  # names of checkpoints that this run has made or resumed from

    def renew(self) -> None:
        """Make and lock the folder again where somebody has removed it.

        UsageError where that fails.
        """
        self._claim = renewed(self._claim, self.path)

    def partial(self, final: Path) -> Path:
        """Where a checkpoint of this run grows before it is published."""
        return partial_folder(final, self._token)

    def count_as_ours(self, checkpoint: Path) -> None:
        """Note that a checkpoint is this run's, which may remove it in time."""
        if checkpoint.parent == self.path:
            self._ours.add(checkpoint.name)

    def publish(self, work: Path, final: Path) -> None:
        """Flush a finished folder and give it its final name.

        OSError or UsageError where that fails.
        """
        if is_there(final):
            self._make_way(final)

        publish_folder(work, final)
        self.count_as_ours(final)

    def _make_way(self, final: Path) -> None:
        """Set aside what has a new checkpoint's name.

        UsageError where it is one, which this run has not made.
        """
        if not self._claim.locked or (is_there(final / MANIFEST) and verify(final) is None):
            raise UsageError(
                f"{final} is there already and not of this run; do two runs write to {self.path}?"
                " Give each its own --save"
            )

        set_aside(final)

    def move_pointers(self, newest: Path, best: str) -> None:
        """Have the pointers name the newest and the best checkpoint."""
        with self._noted("the pointers could not be moved"):
            write_text(self.path / POINTER, newest.name)
            write_text(self.path / MEGATRON_POINTER, newest.name.removeprefix(STEP_FOLDER))
            self._link_best(best)

    def point_to_best(self, best: str) -> None:
        """Link the best checkpoint, where it is there."""
        with self._noted(f"the link {BEST} could not be made"):
            self._link_best(best)

    def _link_best(self, best: str) -> None:
        """Link the best checkpoint where it is there.

        A folder of that name, as copies have it, is set aside.
        """
        link = self.path / BEST
        if best == f"{STEP_FOLDER}0" or not (self.path / best).is_dir():
            return
        if link.is_dir() and not link.is_symlink() and self._claim.locked:
            os.rename(link, self.path / f"unused-{BEST}-{time.time_ns()}")

        point_to(link, best)

    def prune(self, made: Path, best: str, keep_last: int, keep_every: int) -> None:
        """Remove old checkpoints, never the one just made, and none for the sake of one that is
        torn.

        Where there are no locks, only what this run has made or resumed from.
        """
        with self._noted("old checkpoints could not be removed"):
            found = complete_checkpoints(self.path)
            if not self._claim.locked:
                found = [path for path in found if path.name in self._ours]

            whole = [path for path in found if path == made or of_right_size(path)]
            for old in to_prune(whole, keep_last, keep_every, best):
                if old != made:
                    self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        """Remove a checkpoint so that a kill halfway leaves none that is half there."""
        doomed = self.partial(checkpoint)
        os.rename(checkpoint, doomed)
        shutil.rmtree(doomed)

    @contextlib.contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        """Tell of a failure of what follows a commit: the checkpoint is there all the same."""
        try:
            yield
        except (OSError, UsageError) as error:
            self._tell(f"note: {self.path}: {what} ({error})")


def to_prune(
    newest_first: list[Path], keep_last: int, keep_every: int, best: str = ""
) -> list[Path]:
    """Checkpoints to remove: all but the last N (0: none is removed), those whose step is a
    multiple of M, and the best.
    """
    old = [path for path in newest_first[keep_last:] if path.name != best] if keep_last else []
    return [
        path for path in old if not keep_every or int(path.name[len(STEP_FOLDER) :]) % keep_every
    ]
