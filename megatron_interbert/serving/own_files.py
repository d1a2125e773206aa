"""Files of ours in an index: plain files of that name, never links to those of others."""

import errno
from pathlib import Path
from typing import IO

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import open_regular, reading


def open_own(path: Path) -> IO[bytes]:
    """Open a file of ours to read.

    FileNotFoundError where there is none, UsageError where a link or something else has its name,
    Unreadable where the system cannot say.
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
    """Read the content of a file of ours; errors as of `open_own`."""
    with reading(path), open_own(path) as file:
        return file.read()
