"""Manage a run's --save folder: lock it, name what is in it, publish and remove checkpoints."""

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
    """Hold rank 0's lock on a run's --save; on other ranks it is empty."""

    handle: int | None = None  # of the lock file, open as long as the run lives
    locked: bool = False  # only the holder may rename or remove what is not its own


def claim_folder(folder: str, state: ParallelState) -> Claim:
    """Lock --save for this run, on rank 0; UsageError on all ranks if another run holds it."""
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
    """Return a claim that is valid for the folder as it is now; it, and the lock in it, may have
    been removed and are then made again.

    Raises UsageError if another run has taken the lock since.
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
    """Make the folder and take its lock. It belongs to the process: workers forked later do not
    inherit it. UsageError if the folder cannot be written or another run holds the lock.
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
            f"note: --save {folder} cannot be locked ({error.strerror}): this run renames and"
            " removes nothing that it did not make; ensure that no other run writes there",
            flush=True,
        )
        return Claim(handle)

    if not taken:
        holder = " ".join(os.pread(handle, 200, 0).decode("utf-8", "replace").split())
        raise UsageError(
            f"--save {folder}: another run writes there ({holder}); end that process (SIGTERM: it"
            " saves first), or choose another --save"
        )

    with contextlib.suppress(OSError):  # e.g. a full disk; the name is only for people to read
        # A hard-linked backup shares this file, or somebody has planted it.
        if os.fstat(handle).st_nlink > 1:
            return Claim(handle, locked=True)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    return Claim(handle, locked=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary folders left by a run that was killed while saving."""
    for name in list_folder(folder):
        if name.startswith(f".{STEP_FOLDER}") and name.endswith(PARTIAL):
            shutil.rmtree(folder / name, ignore_errors=True)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint so that nothing takes it for one; UsageError if that fails."""
    try:
        os.rename(path, path.with_name(f"{DAMAGED}{path.name}-{time.time_ns()}"))
    except OSError as error:
        raise UsageError(f"{path}: damaged, and cannot be set aside ({error.strerror})") from error


def partial_folder(final: Path, token: str = "") -> Path:
    """Return the temporary name of a checkpoint, used while it is written and while it is removed.

    `token` keeps apart two runs that write to one folder on a disk without locks.
    """
    return final.with_name(f".{final.name}{token and '.'}{token}{PARTIAL}")


class RunFolder:
    """Publish and remove checkpoints and move the pointers, on rank 0.

    `token` is this run's own part of the names of unfinished checkpoints; `tell` is called with a
    message if something fails after a checkpoint has been committed.
    """

    def __init__(self, path: Path, claim: Claim, token: str, tell: Callable[[str], None]) -> None:
        self.path = path
        self._claim = claim  # held open: it keeps other runs out
        self._token = token
        self._tell = tell
        self._ours: set[str] = set()  # names of checkpoints this run made or resumed from

    def renew(self) -> None:
        """Make and lock the folder again if it has been removed; UsageError if that fails."""
        self._claim = renewed(self._claim, self.path)

    def partial(self, final: Path) -> Path:
        """Return the folder in which this run writes a checkpoint before it is published."""
        return partial_folder(final, self._token)

    def count_as_ours(self, checkpoint: Path) -> None:
        """Note that a checkpoint is this run's own, so the run may prune it later."""
        if checkpoint.parent == self.path:
            self._ours.add(checkpoint.name)

    def publish(self, work: Path, final: Path) -> None:
        """Flush a finished folder and rename it to its final name; OSError or UsageError if that
        fails.
        """
        if is_there(final):
            self._make_way(final)

        publish_folder(work, final)
        self.count_as_ours(final)

    def _make_way(self, final: Path) -> None:
        """Set aside what already has a new checkpoint's name; UsageError if it is an intact
        checkpoint, or the folder is not locked.
        """
        if not self._claim.locked or (is_there(final / MANIFEST) and verify(final) is None):
            raise UsageError(
                f"{final} already exists and is not of this run; if two runs write to {self.path},"
                " give each its own --save"
            )

        set_aside(final)

    def move_pointers(self, newest: Path, best: str) -> None:
        """Point to the newest and the best checkpoint."""
        with self._noted("the pointers could not be moved"):
            write_text(self.path / POINTER, newest.name)
            write_text(self.path / MEGATRON_POINTER, newest.name.removeprefix(STEP_FOLDER))
            self._link_best(best)

    def point_to_best(self, best: str) -> None:
        """Link the best checkpoint if it is in this folder."""
        with self._noted(f"the link {BEST} could not be made"):
            self._link_best(best)

    def _link_best(self, best: str) -> None:
        """Link the best checkpoint if it is in this folder.

        A real folder of the link's name, as copying leaves it, is set aside.
        """
        link = self.path / BEST
        if best == f"{STEP_FOLDER}0" or not (self.path / best).is_dir():
            return
        if link.is_dir() and not link.is_symlink() and self._claim.locked:
            os.rename(link, self.path / f"unused-{BEST}-{time.time_ns()}")

        point_to(link, best)

    def prune(self, made: Path, best: str, keep_last: int, keep_every: int) -> None:
        """Remove old checkpoints, never the one just made; torn ones do not count as newer.

        Without a lock, only those that this run made or resumed from are removed.
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
        """Remove a checkpoint, renamed first, so that a kill never leaves half a checkpoint."""
        doomed = self.partial(checkpoint)
        os.rename(checkpoint, doomed)
        shutil.rmtree(doomed)

    @contextlib.contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        """Report a failure after a commit instead of raising: the checkpoint is safe."""
        try:
            yield
        except (OSError, UsageError) as error:
            self._tell(f"note: {self.path}: {what} ({error})")


def to_prune(
    newest_first: list[Path], keep_last: int, keep_every: int, best: str = ""
) -> list[Path]:
    """Return the checkpoints to remove: all except the last `keep_last` (0: keep all), those whose
    step is a multiple of `keep_every`, and the best.
    """
    old = [path for path in newest_first[keep_last:] if path.name != best] if keep_last else []
    return [
        path for path in old if not keep_every or int(path.name[len(STEP_FOLDER) :]) % keep_every
    ]
