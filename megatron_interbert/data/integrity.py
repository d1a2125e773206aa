"""Verify that the files of region stores are as they were written, by hashing each once a machine.

Verified files are remembered per machine with their size and times, so an unchanged file is not
read again. Small stores, and files whose size or time has changed since, are hashed before work
begins; larger amounts are hashed in the background, changed files first.
"""

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_interbert.data.manifest import MANIFEST, files_of, how_to_mend, read_manifest
from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256, write_json
from megatron_interbert.progress import log_lines, progress
from megatron_interbert.reading import reading

SMALL = 1 << 28  # bytes of unseen files that are hashed before work begins: a fraction of a second
LARGE = 1 << 34  # and of changed ones: about 20 s, far less than other ranks wait
SECONDS_TO_REMEMBER = 10.0  # between two writes of the list of verified files
NICE = 10  # niceness of the hashing thread: training comes first
Stamp = list[int]


@dataclass
class StoreFile:
    """Hold a file of a store, its sha256 from the manifest, and what to do if it is damaged."""

    path: Path
    sha256: str
    mend: str

    def stamp(self) -> Stamp:
        """Return what changes with the content: size in bytes, mtime and ctime in ns, inode."""
        found = os.stat(self.path)
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


class Memory:
    """Remember which files of one store this machine has verified: file name -> [stamp, sha256]."""

    def __init__(self, store: Path) -> None:
        place = hashlib.sha256(os.fsencode(os.path.realpath(store))).hexdigest()[:16]
        folder = cache_folder()
        self.path = folder and folder / "verified" / f"{socket.gethostname()}-{place}.json"
        self.entries = self._read()
        self._new: dict[str, Any] = {}
        self._written = time.monotonic()

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_bytes()) if self.path else {}
        except (OSError, ValueError, RecursionError):
            return {}  # then files are verified again

        return found if isinstance(found, dict) else {}

    def knows(self, file: StoreFile) -> bool:
        """Check whether the file was verified and has not changed since."""
        return self.entries.get(file.path.name) == [file.stamp(), file.sha256]

    def saw_change(self, file: StoreFile) -> bool:
        """Check whether a file was verified and its size or mtime has changed since.

        A change of owner, permissions or inode does not count.
        """
        try:
            stamp, _ = self.entries[file.path.name]
            return stamp[:2] != file.stamp()[:2]
        except (KeyError, TypeError, ValueError):
            return False

    def add(self, file: StoreFile, stamp: Stamp) -> None:
        """Remember that a file with this stamp had its sha256; write to disk now and then."""
        self._new[file.path.name] = [stamp, file.sha256]
        if time.monotonic() - self._written > SECONDS_TO_REMEMBER:
            self.write()

    def write(self) -> None:
        """Write new entries to disk, merged with what other processes have verified meanwhile."""
        self._written = time.monotonic()
        self.entries = {**self._read(), **self._new}
        if not self.path or not self._new:
            return
        with contextlib.suppress(
            OSError
        ):  # if the cache cannot be written, files are verified again next time
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.entries)


def cache_folder() -> Path | None:
    """Return this project's cache folder by the XDG rules; None for a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")

    try:
        place = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None

    return place / "megatron_interbert"


class Integrity:
    """Verify region stores, in one process of each machine: `check_at_once`, then `start`."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.problem = ""  # message about the first changed file that the thread found
        self._thread: threading.Thread | None = None

        changed: list[tuple[Memory, StoreFile]] = []
        unseen: list[tuple[Memory, StoreFile]] = []

        for store in dict.fromkeys(map(Path, paths)):
            memory = Memory(store)
            for entry in files_of(read_manifest(store)):
                file = StoreFile(store / entry["file"], entry["sha256"], how_to_mend(entry))
                if not memory.knows(file):
                    (changed if memory.saw_change(file) else unseen).append((memory, file))

        self._at_once: list[tuple[Memory, StoreFile]] = []
        self._beside: list[tuple[Memory, StoreFile]] = []
        for files, most in ((changed, LARGE), (unseen, SMALL)):
            (self._at_once if size_of(files) <= most else self._beside).extend(files)

    def check_at_once(self) -> None:
        """Hash small stores, and files that have changed since they were verified.

        Raises UsageError naming a file that is not as it was written, or cannot be read.
        """
        try:
            problem = verify(self._at_once, progress)
        except OSError as error:
            raise UsageError(f"{error.filename}: {error.strerror}") from error

        if problem:
            raise UsageError(problem)

    def start(self, tell: Callable[[str], None] = lambda problem: None) -> None:
        """Hash the remaining files in a thread, which sets `problem` to a message about the first
        changed file and calls `tell` with it.
        """
        if self._beside and self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(tell,), name="integrity", daemon=True
            )
            self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait for the thread to finish, at most `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, tell: Callable[[str], None]) -> None:
        try:
            with contextlib.suppress(OSError):  # the process may already be nicer than that
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
            self.problem = verify(self._beside, log_lines)
        except (OSError, UsageError) as error:
            print(f"note: the region stores could not be verified ({error})", flush=True)

        if self.problem:
            tell(self.problem)


def size_of(files: Sequence[tuple[Memory, StoreFile]]) -> int:
    """Return the total size of some files in bytes."""
    return sum(file.stamp()[0] for _, file in files)


def verify(files: Sequence[tuple[Memory, StoreFile]], bar_of: Callable[..., tqdm]) -> str:
    """Hash files and remember those that are as they were written; return a message about the
    first that is not, or an empty string.
    """
    total = size_of(files)
    unit = {"unit": "B", "unit_scale": True, "desc": "verifying region stores"}

    try:
        with bar_of(total=total, **unit) as bar:
            for memory, file in files:
                stamp = file.stamp()
                with reading(file.path):
                    digest = file_sha256(file.path, bar.update)
                if digest != file.sha256:
                    return (
                        f"{file.path}: sha256 differs from {MANIFEST}: the file has changed since"
                        f" the store was made; {file.mend}"
                    )

                memory.add(file, stamp)
    finally:
        for memory in {id(memory): memory for memory, _ in files}.values():
            memory.write()

    return ""
