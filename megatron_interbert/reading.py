"""Reading files that may be missing, damaged or out of reach, and telling which it is."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_interbert.errors import Unreadable, UsageError

# What a system answers where no file of that name is there. All else (EACCES, EIO, EMFILE, ESTALE,
# ..) says nothing about the content of a file.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


@contextlib.contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Turn a failure to read `what` into Unreadable.

    FileNotFoundError and the like pass through.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_FILE or error.errno is None:
            raise
        raise Unreadable(
            f"{error.filename or what}: cannot be read ({error.strerror}); this says nothing of its"
            " content: mend permissions, disk or limits and give the same command again"
        ) from error


def open_regular(path: Path, follow: bool = True) -> IO[bytes]:
    """Open a file to read.

    OSError where something else has its name (reading a pipe would never end).

    Without `follow` a link is something else as well.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    handle = os.open(path, flags)
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind == stat.S_IFREG:
        return open(handle, "rb")

    os.close(handle)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))

    raise OSError(errno.EINVAL, "is not a regular file", str(path))


def read_regular(path: Path) -> bytes:
    """Read the content of a file; OSError where something else has its name."""
    with open_regular(path) as file:
        return file.read()


def list_folder(folder: Path) -> list[str]:
    """Give the names in a folder, sorted; none where it is absent.

    Unreadable where it cannot be read.

    `Path.glob` takes a folder that it may not read for an empty one.
    """
    try:
        with reading(folder):
            return sorted(os.listdir(folder))
    except OSError:
        return []


def is_there(path: Path) -> bool:
    """Tell whether something of that name exists; Unreadable where the system cannot say."""
    try:
        with reading(path):
            os.stat(path)
    except OSError:
        return False

    return True


def read_text(path: str | Path, what: str) -> str:
    """Read a text file's content; UsageError naming `what` when it cannot be read."""
    try:
        with reading(path):
            return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{what}: {path} is no text in UTF-8 (byte {error.start}: {error.reason})"
        ) from error
    except OSError as error:
        raise UsageError(f"{what}: cannot read {path} ({error.strerror})") from error


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file; UsageError naming `what` when it is missing or malformed."""
    text = read_text(path, what)

    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: {path} is not valid JSON ({error})") from error

    if not isinstance(value, dict):
        raise UsageError(f"{what}: {path} holds a {type(value).__name__}, expected an object")

    return value


def refuse_constant(name: str) -> None:
    """ValueError for NaN, Infinity and -Infinity, which Python's reader takes for JSON."""
    raise ValueError(f"{name} is no number")
