"""Writing: files and folders that are whole or absent, their hashes, locks, and links to siblings.

Nothing here follows a link of somebody else out of its folder.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_interbert.errors import UsageError

LONGEST_NAME = 255  # bytes of a file's name
REPLACED = (stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR)  # the system itself refuses a folder
HELD = (errno.EAGAIN, errno.EACCES)  # what a lock that another process holds answers


def file_sha256(path: str | Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """Give the hex sha256 of a file; `progress` hears of each chunk's bytes."""
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
    finally:
        os.close(handle)


def file_entry(path: Path) -> dict[str, Any]:
    """Flush a file that is already there and give {bytes, sha256}."""
    flush_file(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def json_sha256(value: Any) -> str:
    """Give the hex sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file of that name that was not there before; what was there is unlinked, never
    followed.

    It is flushed at the end, and removed where that or anything before it fails.
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
    """Open a file that gets its name when it is whole and on disk, and leaves nothing where it
    fails.

    It grows `beside`: NAME.partial, unless other processes may write a file of that name too.
    """
    beside = beside or path.with_name(path.name + ".partial")
    with new_file(beside) as handle:
        yield handle
    try:
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def own_name(path: Path) -> Path:
    """Give a name beside a file that no other process takes."""
    return path.with_name(f"{path.name}.{os.getpid()}.new")


def write_by_name(path: Path, write: Callable[[Path], Any], room: int = 0) -> dict[str, Any]:
    """Have a library write a whole file under another name, flush it, give it its own.

    `room`: bytes that must be free first; HDF5 that meets a full disk in the middle fails again
    when the file is closed, and crashes when the process ends. Gives the entry of a manifest: file,
    bytes, sha256. OSError where it cannot be done.
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
    """Give a folder whose files are on disk its final name, for good."""
    flush_folder(work)
    os.rename(work, final)
    flush_folder(final.absolute().parent)


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write all bytes to a descriptor, which may take them in parts."""
    left = memoryview(data)
    while len(left):
        left = left[os.write(handle, left) :]


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside, flush, rename.

    UsageError where the name belongs to a device, a pipe or a socket.
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
    """Write UTF-8 beside, flush, rename."""
    write_bytes(path, encoded(text))


def encoded(text: str) -> bytes:
    """Encode as UTF-8. Half characters, of file names that are no UTF-8, become escapes as in
    JSON.
    """
    return text.encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON beside and rename it."""
    write_text(path, json_text(value))


def write_output(path: Path, text: str, name: str) -> None:
    """Write the text file that the flag `name` asks for.

    A plain file, or the one that a link leads to, is replaced as a whole; a device or a pipe is
    written to (`/dev/null`, `/dev/stdout`). UsageError where that cannot be done.
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
    """Tell whether a path leads to where standard output goes."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # nothing is there, or this stream is no file
        return False


def json_text(value: Any) -> str:
    """Give indented JSON that people can read."""
    return json.dumps(value, indent=1, ensure_ascii=False)


def append(path: Path, data: bytes) -> None:
    """Append all of some bytes to a file, or nothing: OSError where they cannot be written."""
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
    """Open a file to lock, made where it is absent: a file of its own, never a link to another one.

    UsageError where something else has that name, OSError where it cannot be opened.
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


def take_lock(handle: int, of_process: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False where another process holds it.

    A lock `of_process` is not inherited by processes that are forked later, and its file must be
    open for writing. OSError on a disk that knows no locks.
    """
    lock = fcntl.lockf if of_process else fcntl.flock

    try:
        lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        raise

    return True


def open_folder(folder: Path) -> int:
    """Open a folder to lock it; OSError for a link, and for what is no folder."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


@contextlib.contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Hold a file's lock. UsageError with `what` where another process holds it."""
    handle = open_lock(path)

    try:
        try:
            taken = take_lock(handle)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be locked ({error.strerror}); use a disk with locks"
            ) from error

        if not taken:
            raise UsageError(f"{path.parent}: {what}")

        yield
    finally:
        os.close(handle)


def point_to(link: Path, name: str) -> None:
    """Make a link to a sibling, or have it point there, in one step."""
    beside = link.with_name(f".{link.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(name)
    os.replace(beside, link)


def sibling(link: Path) -> Path | None:
    """Give the folder beside it that a link of ours names.

    None where there is none, or it leads nowhere.

    A folder of the link's name, as copies without links have it, stands for itself. UsageError
    where the link leads elsewhere, or through another link.
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
    """Tell whether a text can only name something in the folder at hand."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    if any(letter in "/\\" or not letter.isprintable() for letter in name):
        return False
    return len(encoded(name)) <= LONGEST_NAME


def check_writable(folder: Path, flag: str) -> None:
    """Raise UsageError where files cannot be written to a folder, or to the nearest one above it
    that is there.

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
    """Raise UsageError where no file can be written under a name; leaves nothing behind."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        kind = stat.S_IFREG  # it will be one
    except OSError as error:  # a link to itself, a name that is too long
        raise UsageError(f"{flag} {path}: cannot be written ({error.strerror})") from None

    if kind == stat.S_IFDIR:
        raise UsageError(f"{flag} {path}: is a folder, expected a file to write")
    if kind == stat.S_IFREG:
        check_writable(path.parent, flag)


def nearest_folder(folder: Path) -> Path:
    """Find the folder, or the one above it in which it would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place
