"""Manage folders of unfinished work: locked by one process, never reached through a link, and
cleared only of files that this project makes.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_interbert.errors import UsageError
from megatron_interbert.files import open_folder, take_lock
from megatron_interbert.reading import list_folder


def lock_folder(folder: Path, busy: str, shared: bool = False) -> int:
    """Make a folder, or take an existing one, and lock it; return the descriptor that holds the
    lock. Several processes may hold a `shared` lock.

    Raises UsageError if a link or a file has its name, or (with the text `busy`) if another process
    holds the lock. On a file system without locks it prints a note and continues.
    """
    refuse_link(folder)

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(
            f"{error.filename}: is not a folder, expected one that this command makes; move it"
            " elsewhere"
        ) from None

    handle = open_folder(folder)

    try:
        taken = take_lock(handle, shared=shared)
    except OSError as error:
        taken = True
        print(
            f"note: {folder} cannot be locked ({error.strerror}); make sure that no other process"
            " works there",
            flush=True,
        )

    if not taken:
        os.close(handle)
        raise UsageError(f"{folder}: {busy}")

    return handle


def refuse_link(path: Path) -> None:
    """Raise UsageError if the path is a symbolic link instead of a folder that a command made."""
    if path.is_symlink():
        raise UsageError(
            f"{path}: is a link to {os.readlink(path)[:200]!r}, expected a folder that this command"
            " has made; nothing was touched; remove the link"
        )


def own_names(folder: Path, ours: Sequence[str]) -> list[str]:
    """List the names in a folder that match the patterns `ours`, in the order of the patterns; a
    pattern for folders ends with a slash.
    """
    found = []

    for name in list_folder(folder):
        place = _place(folder, name, ours)
        if place is not None:
            found.append((place, name))

    return [name for _, name in sorted(found)]


def refuse_strangers(folder: Path, ours: Sequence[str]) -> None:
    """Raise UsageError naming a file in the folder that matches none of the patterns `ours`.

    Hidden files are ignored: operating systems and network disks leave theirs anywhere.
    """
    for name in list_folder(folder):
        if not name.startswith(".") and _place(folder, name, ours) is None:
            raise UsageError(
                f"{folder}: holds {name[:200]!r}, which this command did not make; nothing was"
                " removed; move it elsewhere, or remove the folder if nothing in it is needed"
            )


def remove_own(folder: Path, ours: Sequence[str]) -> None:
    """Remove the files that match the patterns `ours`, in the order of the patterns."""
    for name in own_names(folder, ours):
        (folder / name).unlink(missing_ok=True)


def remove_folder(folder: Path, ours: Sequence[str]) -> None:
    """Remove the files that match the patterns `ours`, and the folder if nothing else is in it."""
    remove_own(folder, ours)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR):
            raise


def _place(folder: Path, name: str, ours: Sequence[str]) -> int | None:
    """Return the number of the first pattern that a name matches; None if it matches none."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR((folder / name).lstat().st_mode):
            name += "/"

    return next((place for place, pattern in enumerate(ours) if fnmatchcase(name, pattern)), None)
