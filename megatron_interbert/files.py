"""Write files and folders that are whole or absent; hash, lock and link them.

Links that others may have planted are not followed out of their folder; only `write_output` follows
the path that the user gives.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_interbert.errors import UsageError

LONGEST_NAME = 255  # bytes of a file name
REPLACED = (stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR)  # the system refuses folders itself
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP)  # disks over a network that cannot flush a folder
HELD = (errno.EAGAIN, errno.EACCES)  # errors for a lock that another process holds


def readable_size(count: float) -> str:
    """Return a number of bytes for a message, such as `24.93 GB` or `0.81 MB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:.2f} {unit}"

    return f"{count / 1e6:.2f} MB"


def file_sha256(path: str | Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """Return the hex sha256 of a file; call `progress` with the byte count of each chunk."""
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(1 << 20))

    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(chunk):
            digest.update(chunk[:count])
            progress(count)

    return digest.hexdigest()


def flush_file(path: Path) -> None:
    """Wait until a file's content is on disk."""
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def flush_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
    finally:
        os.close(handle)


def file_entry(path: Path) -> dict[str, Any]:
    """Flush an existing file to disk and return its {bytes, sha256}."""
    flush_file(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def json_sha256(value: Any) -> str:
    """Return the hex sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file for writing; whatever has its name is unlinked, never followed.

    It is flushed to disk at the end, and removed if that or anything before it fails.
    """
    if os.path.lexists(path):
        path.unlink(missing_ok=True)

    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_file(path: Path, beside: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file that gets its name once it is whole and on disk; a failure leaves nothing.

    Until then it is called `beside`, by default NAME.partial; pass another name if several
    processes may write the file at once.
    """
    beside = beside or path.with_name(path.name + ".partial")
    with new_file(beside) as handle:
        yield handle

    try:
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def own_name(path: Path) -> Path:
    """Return a temporary name beside a file that no other process on any machine uses."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.new")


def write_by_name(path: Path, write: Callable[[Path], Any], room: int = 0) -> dict[str, Any]:
    """Have a library write a file under a temporary name, flush it and rename it.

    `room`: bytes to reserve on the disk first; HDF5 that meets a full disk midway fails again when
    the file is closed, and crashes when the process ends. Returns the manifest entry of the file:
    {file, bytes, sha256}. Raises OSError if it cannot be written.
    """
    beside = own_name(path)

    try:
        if room:
            with open(beside, "wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, room)

        write(beside)
        entry = {"file": path.name, **file_entry(beside)}
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise

    return entry


def publish_folder(work: Path, final: Path) -> None:
    """Rename a folder whose files are on disk to its final name, durably."""
    flush_folder(work)
    os.rename(work, final)
    flush_folder(final.absolute().parent)


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write all bytes to a descriptor, which may accept them in parts."""
    left = memoryview(data)
    while len(left):
        left = left[os.write(handle, left) :]


def write_bytes(path: Path, data: bytes) -> None:
    """Write a temporary file beside `path`, flush it and rename it.

    Raises UsageError if the name belongs to a device, a pipe or a socket.
    """
    if not path.name:  # `.` or `/`
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if os.path.lexists(path) and stat.S_IFMT(os.lstat(path).st_mode) not in REPLACED:
        raise UsageError(
            f"{path}: is a device, a pipe or a socket and is not overwritten; choose another name"
        )

    with whole_file(path) as handle:
        write_all(handle.fileno(), data)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    write_bytes(path, encoded(text))


def encoded(text: str) -> bytes:
    """Encode as UTF-8; lone surrogates, from file names that are not UTF-8, become \\uXXXX."""
    return text.encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(path, json_text(value))


def write_output(path: Path, text: str, name: str) -> None:
    """Write the text file that the flag `name` asks for.

    A regular file, also one that a link leads to, is replaced as a whole; a device or a pipe is
    written to (`/dev/null`, `/dev/stdout`). Raises UsageError if it cannot be written.
    """
    check_output(path, name)

    try:
        if is_standard_output(path):
            sys.stdout.write(text)
            sys.stdout.flush()
        elif path.exists() and not path.is_file():
            path.write_bytes(encoded(text))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(Path(os.path.realpath(path)), text)
    except OSError as error:
        raise UsageError(f"{name} {path}: cannot be written ({error.strerror})") from error


def is_standard_output(path: Path) -> bool:
    """Check whether a path leads to the same file or device as standard output."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # nothing has that name, or the stream has no descriptor
        return False


def json_text(value: Any) -> str:
    """Return indented JSON, with non-ASCII text as it is."""
    return json.dumps(value, indent=1, ensure_ascii=False)


def append(path: Path, data: bytes) -> None:
    """Append bytes to a regular file, all or none; raises OSError if they cannot be written."""
    handle = os.open(
        path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666
    )

    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))

        before = os.fstat(handle).st_size
        try:
            write_all(handle, data)
        except OSError:
            os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)


def open_lock(path: Path) -> int:
    """Open a lock file, created if absent, and return its descriptor; links are not followed.

    Raises UsageError if something else has that name, OSError if it cannot be opened.
    """
    wrong = f"{path}: expected a lock file, found something else, which is left alone; remove it"

    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise UsageError(wrong) from None
        raise

    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UsageError(wrong)

    return handle


def take_lock(handle: int, of_process: bool = False, shared: bool = False) -> bool:
    """Lock an open file or folder until it is closed; return False if another process holds it.

    A lock `of_process` is not inherited by processes that are forked later, and its file must be
    open for writing. Several processes may hold a `shared` lock. Raises OSError on a file system
    without locks.
    """
    lock = fcntl.lockf if of_process else fcntl.flock
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX

    try:
        lock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        raise

    return True


def open_folder(folder: Path) -> int:
    """Open a folder to lock it and return its descriptor; raises OSError for a link or a file."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


@contextlib.contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Hold a file's lock; raises UsageError with `what` if another process holds it."""
    handle = open_lock(path)

    try:
        try:
            taken = take_lock(handle)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be locked ({error.strerror}); use a file system with locks"
            ) from error

        if not taken:
            raise UsageError(f"{path.parent}: {what}")

        yield
    finally:
        os.close(handle)


def point_to(link: Path, name: str) -> None:
    """Create or redirect a link to a sibling, atomically."""
    beside = link.with_name(f".{link.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(name)
    os.replace(beside, link)


def sibling(link: Path) -> Path | None:
    """Return the folder beside it that a link of ours names; None if either is absent.

    A folder in place of the link, as in copies made without links, is returned itself. Raises
    UsageError if the link leads elsewhere, or to another link.
    """
    if not link.is_symlink():
        return link if link.is_dir() else None

    name = os.readlink(link)
    place = link.parent / name
    if not is_plain_name(name) or place.is_symlink():
        raise UsageError(
            f"{link}: names {name[:80]!r}, expected a folder beside it; remove that link"
        )

    return place if place.is_dir() else None


def is_plain_name(name: Any) -> bool:
    """Check whether a value can only name something directly in a folder, as a file name does."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    if any(letter in "/\\" or not letter.isprintable() for letter in name):
        return False
    return len(encoded(name)) <= LONGEST_NAME


def check_writable(folder: Path, flag: str) -> None:
    """Raise UsageError if files cannot be written to a folder, or to its nearest existing parent.

    Leaves nothing behind.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=nearest_folder(folder), prefix=".writable-"):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag} {folder}: nothing can be written there ({error.strerror}); choose another"
            " folder"
        ) from None


def check_output(path: Path, flag: str) -> None:
    """Raise UsageError if no file can be written to a path; leaves nothing behind."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        kind = stat.S_IFREG  # it will be a regular file
    except OSError as error:  # a link to itself, a name that is too long
        raise UsageError(f"{flag} {path}: cannot be written ({error.strerror})") from None

    if kind == stat.S_IFDIR:
        raise UsageError(f"{flag} {path}: is a folder, expected a file to write")
    if kind == stat.S_IFREG:
        check_writable(path.parent, flag)


def nearest_folder(folder: Path) -> Path:
    """Return the folder, or the nearest existing parent in which it would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place
