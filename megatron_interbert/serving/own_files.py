"""Read our own files in an index: only regular files, never links to somebody else's."""

import errno
from pathlib import Path
from typing import IO

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import open_regular, reading


def open_own(path: Path) -> IO[bytes]:
    """Open one of our files for reading.

    Raises FileNotFoundError if there is none, UsageError if the name belongs to a link or anything
    else, and Unreadable if the system cannot read it now.
    """
    with reading(path):
        try:
            return open_regular(path, follow=False)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.EINVAL):
                raise
            raise UsageError(
                f"{path}: expected a plain file, found a link or something else, which is not read;"
                " restore the file, or remove what is there"
            ) from None


def read_own(path: Path) -> bytes:
    """Return the content of one of our files; raises what `open_own` raises."""
    with reading(path), open_own(path) as file:
        return file.read()
