"""Read the arrays of npz and npy files, and the values of pickles in them if the user says so."""

import os
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_interbert.preparation.building.dtype_codes import array_bytes
from megatron_interbert.preparation.building.pickles.reading import loads
from megatron_interbert.preparation.building.plain_arrays import make_array
from megatron_interbert.preparation.building.sources.fields import BadRecord
from megatron_interbert.reading import open_regular

# what a damaged or foreign file can raise while it is read
DAMAGE = (
    *(
        OSError,
        ValueError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        MemoryError,
        RuntimeError,
    ),
    *(TypeError, AttributeError, IndexError, SyntaxError, tokenize.TokenError),
)
PICKLED = "a pickle that was not read"
LARGEST_IMAGE = 256 << 20  # bytes of all arrays of a file, unpacked
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those that NumPy uses


def read_npz(file: Path | IO[bytes], trust_pickle: bool) -> dict[str, Any]:
    """Read all arrays of an npz file by name.

    A pickled value is decoded if pickles are trusted; otherwise fields[PICKLED] is its name. Raises
    BadRecord for an archive that would take more memory than any image, and the errors of DAMAGE.
    """
    fields: dict[str, Any] = {}

    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_archive(members)

        for member in members:
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as handle:
                value = _read_array(handle, member.file_size, trust_pickle)
            if value is PICKLED:
                fields[PICKLED] = name
            elif value is not None:
                fields[name] = value

    return fields


def read_npy(path: Path, trust_pickle: bool) -> Any:
    """Read an npy file: an array, or the value of its pickle (PICKLED unless pickles are trusted).

    Raises BadRecord if it is larger than any image's, and the errors of DAMAGE.
    """
    with open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > LARGEST_IMAGE:
            raise BadRecord("larger than any image's", f"{size} bytes, at most {LARGEST_IMAGE}")

        return _read_array(handle, size, trust_pickle)


def shape_of_npy(path: Path) -> tuple[int, ...]:
    """Return the shape of the array in an npy file, () for a pickle; raise the errors of DAMAGE."""
    with open_regular(path) as handle:
        shape, _, dtype = _header(handle)

    return () if dtype.hasobject else shape


def _check_archive(members: list[zipfile.ZipInfo]) -> None:
    """Raise BadRecord for an archive that is too large or not compressed as NumPy does it.

    zipfile never unpacks more than a member's stated size.
    """
    size = sum(member.file_size for member in members)
    if size > LARGEST_IMAGE:
        raise BadRecord(
            "larger than any image's", f"{size} bytes unpacked, at most {LARGEST_IMAGE}"
        )

    for member in members:
        if member.compress_type not in COMPRESSIONS:
            kind = f"{member.filename}: method {member.compress_type}"
            raise BadRecord("compressed as NumPy does not", kind)


def _read_array(handle: IO[bytes], size: int, trust_pickle: bool) -> Any:
    """Read one member of `size` bytes: an array, or the value of its pickle (PICKLED unless pickles
    are trusted).
    """
    shape, fortran, dtype = _header(handle)
    if dtype.hasobject:
        value = loads(handle.read()) if trust_pickle else PICKLED
        return value.item() if isinstance(value, np.ndarray) and value.shape == () else value

    expected = array_bytes(dtype.str, shape)  # records are of type V here and refused
    if expected > size:
        ends = f"an array of {expected} bytes in {size}"
        raise BadRecord("not a readable npz without pickles", ends)

    return make_array(dtype.str, shape, handle.read(expected), "F" if fortran else "C")


def _header(handle: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(handle)
    read = np.lib.format.read_array_header_2_0
    if version == (1, 0):
        read = np.lib.format.read_array_header_1_0

    with warnings.catch_warnings(action="ignore"):  # about headers of Python 2
        return read(handle)
