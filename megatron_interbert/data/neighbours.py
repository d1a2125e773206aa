"""Tables of neighbours in files: rows of indexes, -1 where there are fewer."""

from pathlib import Path

import numpy as np


class NoTable(ValueError):
    """A file that was read and is no table of neighbours; says what it is and what was expected."""


def read_neighbours(path: Path, rows: int, below: int) -> np.ndarray:
    """Map a table [rows, K] of whole numbers from -1 to `below` - 1, read-only.

    NoTable for anything else, OSError where the file cannot be read.
    """
    try:
        table = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # whatever NumPy says of a header that it cannot use
        raise NoTable(f"no NumPy file ({error})") from error

    fits = table.ndim == 2 and len(table) == rows and table.shape[1] > 0
    if not fits or table.dtype.kind not in "iu":
        raise NoTable(
            f"{table.dtype} {list(table.shape)}, expected whole numbers in {rows} rows and a column"
            " or more"
        )

    least = table.min(initial=0)
    most = table.max(initial=0)
    if least < -1 or most >= below:
        raise NoTable(f"indexes from {least} to {most}, expected -1 to {below - 1}")

    return table
