"""Find and read photos by image id.

Ids come with the features, from anywhere, so they never become paths: an id is looked up in a
listing of the folder, and the file found is opened without following links.
"""

import errno
import functools
import logging
import os
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_interbert.errors import UsageError

TYPES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png"}  # in order of preference
MOST_BYTES = 256 << 20  # larger files are not shown
SETTLED = 2.0  # seconds after which another change of a folder changes its modification time
# pause before the next listing as a multiple of the time a listing takes, so that a folder that
# keeps changing is not listed all the time
PAUSE = 10
log = logging.getLogger("megatron_interbert.data")
GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}


@dataclass(frozen=True)
class Photo:
    """Hold a photo in memory: its kind, `jpeg` or `png`, and the bytes of its file."""

    kind: str
    data: bytes


@dataclass(frozen=True)
class _Listing:
    """Hold what a folder contained when it was listed; all paths are relative to the root."""

    files: dict[str, str]  # image id -> path
    links: dict[str, str]  # path of a link -> path of its file
    folders: dict[str, "PhotoFolder"]
    stamp: tuple[int, int, int]  # device, inode and modification time of the folder
    settled: bool  # whether any later change shows in the stamp
    next_at: float  # earliest time of the next listing, on the monotonic clock


class PhotoFolder:
    """Read photos IMAGE_ID.jpg, .jpeg or .png of a folder; the part of an id before a slash names a
    subfolder.

    Hidden files, links to folders and links to files outside `root` are left out. The folder is
    listed again when it has changed. `root` is the folder that the user named, to whose files links
    may lead, and `below` the path of this folder in it.
    """

    def __init__(self, root: str | Path, below: str = "") -> None:
        self.root = Path(root)
        self.below = below
        self.path = self.root / below
        self._listing: _Listing | None = None
        self._lock = threading.Lock()  # concurrent requests wait for one listing

    def has(self, image_id: str) -> bool:
        """Check whether there is a photo of an image."""
        return self._find(image_id) is not None

    def read(self, image_id: str) -> Photo | None:
        """Read the photo of an image; None if there is none.

        Raises UsageError if the system does not let it be read.
        """
        found = self._find(image_id)
        if found is None:
            return None

        path, target = found
        try:
            data = _read_below(self.root, target)
        except OSError as error:
            if error.errno in GONE:
                return None
            raise _not_read(self.root / path, error) from error

        return None if data is None else Photo(TYPES[Path(path).suffix], data)

    def _find(self, image_id: str) -> tuple[str, str] | None:
        """Return the path of an image's photo and that of its file, which differ for a link; None
        if there is none.
        """
        first, slash, rest = image_id.partition("/")
        listing = self._current()
        if slash:
            folder = listing.folders.get(first)
            return folder._find(rest) if folder else None

        path = listing.files.get(image_id)

        return (path, listing.links.get(path, path)) if path else None

    def _current(self) -> _Listing:
        """Return the listing of the folder as it is now, or was a short while ago."""
        try:
            with self._lock:
                known = self._listing
                if known is None or self._may_differ(known):
                    known = self._listing = self._list()
        except OSError as error:
            if error.errno in GONE:
                return _Listing({}, {}, {}, (0, 0, 0), False, 0.0)
            raise _not_read(self.path, error) from error

        return known

    def _may_differ(self, known: _Listing) -> bool:
        changed = not known.settled or _stamp(self.path) != known.stamp
        return changed and time.monotonic() >= known.next_at

    def _list(self) -> _Listing:
        """List the folder; raises OSError if that fails."""
        begun = time.monotonic()
        stamp = _stamp(self.path)
        settled = time.time() - stamp[2] / 1e9 > SETTLED
        inside = Path(os.path.realpath(self.root))
        files: dict[str, str] = {}
        links: dict[str, str] = {}
        folders: dict[str, PhotoFolder] = {}
        left_out = 0

        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders[entry.name] = PhotoFolder(
                        self.root, os.path.join(self.below, entry.name)
                    )
                    continue

                stem, suffix = os.path.splitext(entry.name)
                path = os.path.join(self.below, entry.name)
                if suffix not in TYPES or not _preferred(suffix, files.get(stem)):
                    continue
                if entry.is_file(follow_symlinks=False):
                    files[stem] = path
                elif entry.is_symlink() and (target := _file_inside(entry.path, inside)):
                    files[stem] = path
                    links[path] = target
                elif entry.is_symlink():
                    left_out += 1

        if left_out and self._listing is None:
            log.warning(
                "%s: %d links to photos outside the folder are not followed", self.path, left_out
            )

        took = time.monotonic() - begun

        return _Listing(files, links, folders, stamp, settled, begun + (1 + PAUSE) * took)


@functools.lru_cache(maxsize=16)
def photos_in(folder: str) -> PhotoFolder | None:
    """Return the photos of a folder, the same object for the same name; None for an empty name."""
    return PhotoFolder(folder) if folder else None


def _preferred(suffix: str, known: str | None) -> bool:
    """Check whether a photo with this suffix takes precedence over the known one of its image."""
    if known is None:
        return True

    kinds = list(TYPES)

    return kinds.index(suffix) < kinds.index(os.path.splitext(known)[1])


def _file_inside(link: str | Path, inside: Path) -> str | None:
    """Return the path, relative to `inside`, of the file that a link leads to; None if it is not
    there.
    """
    target = Path(os.path.realpath(link))
    if not target.is_relative_to(inside) or not os.path.isfile(target):
        return None
    return str(target.relative_to(inside))


def _stamp(folder: Path) -> tuple[int, int, int]:
    facts = os.stat(folder)
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns


def _not_read(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path}: could not be read ({error.strerror}); fix that and try again")


def _read_below(folder: Path, path: str) -> bytes | None:
    """Read the bytes of a file below a folder; None if it is not a regular file or too large."""
    with _open_below(folder, path) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return None
        data = file.read(MOST_BYTES + 1)

    return data if len(data) <= MOST_BYTES else None


def _open_below(folder: Path, path: str) -> IO[bytes]:
    """Open a file below a folder for reading.

    Each part of the path is opened relative to the one before, and none may be a link: OSError if
    one was replaced by a link after it was listed.
    """
    *parts, name = path.split("/")
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    try:
        for part in parts:
            inner = os.open(
                part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place
            )
            os.close(place)
            place = inner

        descriptor = os.open(
            name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place
        )
    finally:
        os.close(place)

    return open(descriptor, "rb")
