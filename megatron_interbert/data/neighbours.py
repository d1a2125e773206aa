"""Read tables of mined neighbours: rows of indexes, padded with -1."""

from pathlib import Path

import numpy as np


class NoTable(ValueError):
    """Report a file that was read but is no table of neighbours: what it is, what was expected."""


def read_neighbours(path: Path, rows: int, below: int) -> np.ndarray:
    """Map a table [rows, K] of integers from -1 to `below` - 1, read-only.

    Raises NoTable for anything else, OSError if the file cannot be read.
    """
    try:
        table = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # whatever NumPy raises for a bad header
        raise NoTable(f"not a NumPy file ({error})") from error

    fits = table.ndim == 2 and len(table) == rows and table.shape[1] > 0
    if not fits or table.dtype.kind not in "iu":
        raise NoTable(
            f"{table.dtype} {list(table.shape)}, expected integers in {rows} rows and one or more"
            " columns"
        )

    least = table.min(initial=0)
    most = table.max(initial=0)
    if least < -1 or most >= below:
        raise NoTable(f"indexes from {least} to {most}, expected -1 to {below - 1}")

    return table
