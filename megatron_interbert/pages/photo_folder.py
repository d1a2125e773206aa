"""Photos named by image id.

An id comes with the features, from anywhere, so it never becomes a path: it is looked up in a
listing of the folder, and what is found is opened without following a link.
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

TYPES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png"}  # in the order of preference
MOST_BYTES = 256 << 20  # a larger file is no photo that a page could show
SETTLED = 2.0  # seconds after which another change of a folder shows in its time
# times as long as a listing takes, before the next one: a folder that always changes is not always
# listed
PAUSE = 10
log = logging.getLogger("megatron_interbert.data")
GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}


@dataclass(frozen=True)
class Photo:
    """A photo in memory: `jpeg` or `png`, and the bytes of its file."""

    kind: str
    data: bytes


@dataclass(frozen=True)
class _Listing:
    """What a folder held. All paths are below the root."""

    files: dict[str, str]  # image id -> path
    links: dict[str, str]  # path of a link -> path of its file
    folders: dict[str, "PhotoFolder"]
    stamp: tuple[int, int, int]  # device, inode and time of the folder
    settled: bool
    next_at: float  # on the monotonic clock


class PhotoFolder:
    """Photos IMAGE_ID.jpg, .jpeg or .png of a folder; the part of an id before a slash names a
    folder in it.

    Hidden files and links to folders are left out, and so are links to files outside of the folder.
    It is listed again when it has changed. `below`: the path of this folder in the one that the
    user named, whose files alone are shown.
    """

    def __init__(self, root: str | Path, below: str = "") -> None:
        self.root = Path(root)
        self.below = below
        self.path = self.root / below
        self._listing: _Listing | None = None
        self._lock = threading.Lock()  # requests that come together wait for one listing

    def has(self, image_id: str) -> bool:
        """Tell whether there is a photo of an image."""
        return self._find(image_id) is not None

    def read(self, image_id: str) -> Photo | None:
        """Read the photo of an image, or None where there is none.

        UsageError where the system does not let it be read.
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
        """Find the path of the photo of an image, and that of its file, which is another one for a
        link.
        """
        first, slash, rest = image_id.partition("/")
        listing = self._current()
        if slash:
            folder = listing.folders.get(first)
            return folder._find(rest) if folder else None

        path = listing.files.get(image_id)

        return (path, listing.links.get(path, path)) if path else None

    def _current(self) -> _Listing:
        """Give the listing as the folder is now, or as it was a short while ago."""
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
        """Look at every name in the folder once. OSError when it cannot be listed."""
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
                "%s: %d links to photos outside of the folder are not followed", self.path, left_out
            )

        took = time.monotonic() - begun

        return _Listing(files, links, folders, stamp, settled, begun + (1 + PAUSE) * took)


@functools.lru_cache(maxsize=16)
def photos_in(folder: str) -> PhotoFolder | None:
    """Give the photos of a folder, the same object for the same name; None for an empty name."""
    return PhotoFolder(folder) if folder else None


def _preferred(suffix: str, known: str | None) -> bool:
    """Tell whether a photo of this ending is taken rather than the one that is known of the same
    image.
    """
    if known is None:
        return True

    kinds = list(TYPES)

    return kinds.index(suffix) < kinds.index(os.path.splitext(known)[1])


def _file_inside(link: str | Path, inside: Path) -> str | None:
    """Give the path below `inside` of the file that a link leads to.

    None where it leads elsewhere.
    """
    target = Path(os.path.realpath(link))
    if not target.is_relative_to(inside) or not os.path.isfile(target):
        return None
    return str(target.relative_to(inside))


def _stamp(folder: Path) -> tuple[int, int, int]:
    facts = os.stat(folder)
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns


def _not_read(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path}: could not be read ({error.strerror}); mend that and try again")


def _read_below(folder: Path, path: str) -> bytes | None:
    """Read the bytes of a file below a folder; None where it is no regular file, or too large."""
    with _open_below(folder, path) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return None
        data = file.read(MOST_BYTES + 1)

    return data if len(data) <= MOST_BYTES else None


def _open_below(folder: Path, path: str) -> IO[bytes]:
    """Open what lies below a folder.

    Each part of the path is opened in the one before it and none of them may be a link, so what is
    swapped for a link after it was listed is not followed: that is an OSError.
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
