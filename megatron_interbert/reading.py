"""Read files that may be missing, damaged or out of reach, and report which it is."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_interbert.encodings import SAMPLE, guess_encoding, how_to_convert
from megatron_interbert.errors import Unreadable, UsageError

# kinds of archives, by how their files begin
ARCHIVES = (("a zip archive", b"PK\x03\x04"), ("compressed by gzip", b"\x1f\x8b"))
# Errors that mean that no file of that name exists. All others (EACCES, EIO, EMFILE, ESTALE, ..)
# say nothing about the content of a file.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


@contextlib.contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Turn OSError while reading `what` into Unreadable; errors of NO_FILE pass through."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_FILE or error.errno is None:
            raise
        raise Unreadable(
            f"{error.filename or what}: cannot be read ({error.strerror}), which says nothing about"
            " its content; fix permissions, disk or limits and run the same command again"
        ) from error


def open_regular(path: Path, follow: bool = True) -> IO[bytes]:
    """Open a regular file for reading, without `follow` not through a link.

    Raises OSError for anything else (reading a pipe might never end).
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
    """Read a regular file; raises OSError for anything else."""
    with open_regular(path) as file:
        return file.read()


def list_folder(folder: Path) -> list[str]:
    """Return the sorted names in a folder; empty if it is absent.

    Raises Unreadable if it cannot be read, where `Path.glob` would find nothing.
    """
    try:
        with reading(folder):
            return sorted(os.listdir(folder))
    except OSError:
        return []


def is_there(path: Path) -> bool:
    """Check whether a path exists; raises Unreadable if the system cannot tell."""
    try:
        with reading(path):
            os.stat(path)
    except OSError:
        return False

    return True


def read_text(path: str | Path, what: str) -> str:
    """Read a UTF-8 text file, with or without a byte order mark; raises UsageError naming `what` if
    it cannot be read.
    """
    try:
        with reading(path):
            return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        if archive := next((n for n, start in ARCHIVES if error.object.startswith(start)), ""):
            raise UsageError(f"{what}: {path} is {archive}; unpack it first") from error

        encoding = guess_encoding(error.object[:SAMPLE])
        problem = f"is not UTF-8 text (byte {error.start}: {error.reason})"
        raise UsageError(
            f"{what}: {path} {how_to_convert(path, encoding) if encoding else problem}"
        ) from error
    except OSError as error:
        raise UsageError(f"{what}: cannot read {path} ({error.strerror})") from error


def read_json(
    path: str | Path, what: str, keep: Callable[[dict[str, Any]], Any] | None = None
) -> dict[str, Any]:
    """Read a JSON object; raises UsageError naming `what` if it is missing or malformed.

    `keep` replaces each object in the file as soon as it is read, to leave out what would fill the
    memory.
    """
    value = read_json_value(path, what, keep)
    if not isinstance(value, dict):
        raise UsageError(f"{what}: {path} holds a {type(value).__name__}, expected an object")

    return value


def read_json_value(
    path: str | Path, what: str, keep: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """Read a JSON file of any kind of value; see `read_json`."""
    text = read_text(path, what)

    try:
        return json.loads(text, parse_constant=refuse_constant, object_hook=keep)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: {path} is not valid JSON ({error})") from error


def refuse_constant(name: str) -> None:
    """Raise ValueError for NaN, Infinity and -Infinity, which Python's parser accepts as JSON."""
    raise ValueError(f"{name} is not a number")
