"""Files of ours in an index: plain files of that name, never links to those of others."""

import errno
import os
import stat
from pathlib import Path
from typing import IO

from megatron_interbert.errors import UsageError
from megatron_interbert.files import reading


def open_own(path: Path) -> IO[bytes]:
    """Open a file of ours to read.

    FileNotFoundError where there is none, UsageError where a link or something else has its name,
    Unreadable where the system cannot say.
    """
    wrong = (
        f"{path}: expected a plain file, found a link or something else, which is not read; restore"
        " the file, or remove what is there"
    )
    try:
        with reading(path):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(wrong) from None
        raise

    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UsageError(wrong)
    return open(handle, "rb")


def read_own(path: Path) -> bytes:
    """Give the content of a file of ours; errors as of `open_own`."""
    with reading(path), open_own(path) as file:
        return file.read()
