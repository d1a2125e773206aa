"""Open text files as people have them: UTF-8 with or without a byte order mark, any line ends.

Other encodings are refused with the command that converts them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_interbert.encodings import SAMPLE, guess_encoding, how_to_convert
from megatron_interbert.errors import UsageError
from megatron_interbert.reading import reading

UNPACK = "unpack it and give what is in it"
OTHER_FILES = {  # first bytes -> what a file is, what to do
    b"\x1f\x8b": ("compressed (gzip)", UNPACK),
    b"PK\x03\x04": ("an archive or a spreadsheet (zip)", f"{UNPACK}, or save the sheet as CSV"),
    b"BZh": ("compressed (bzip2)", UNPACK),
    b"\xfd7zXZ": ("compressed (xz)", UNPACK),
    b"\x93NUMPY": ("a NumPy array", "give the file with the captions"),
    b"\x89HDF": ("an HDF5 file", "give the file with the captions"),
    b"SQLite format 3": ("a database (SQLite)", "export the table with the captions as CSV"),
    b"\x80": ("a pickle", "write its captions as JSON"),
    b"\xff\xd8\xff": ("a photo", "give the file with the captions"),
    b"\x89PNG": ("a photo", "give the file with the captions"),
    b"version https://git-lfs": ("a placeholder of Git LFS", "run: git lfs pull"),
    b"<!DOCTYPE": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
}


def open_text(path: str | Path, what: str = "--captions ") -> TextIO:
    """Open a text file, after its byte order mark; bytes that are not UTF-8 become lone surrogates.

    Lines end with `\\n`, with `\\r` before it or not, or in a file without any, with `\\r`. Raises
    UsageError for other encodings, and for files that are no text.
    """
    try:
        with reading(path):
            sample = _sample(path)
            end = "\r" if b"\r" in sample and b"\n" not in sample else "\n"
            handle = open(path, encoding="utf-8-sig", errors="surrogateescape", newline=end)
    except OSError as error:
        raise UsageError(f"{what}{path}: cannot be read ({error.strerror})") from error

    try:
        _refuse_other_files(f"{what}{path}", sample)
        encoding = guess_encoding(sample)
        if encoding:
            raise UsageError(f"{what}{path}: {how_to_convert(path, encoding)}")
    except BaseException:
        handle.close()
        raise

    return handle


def _sample(path: str | Path) -> bytes:
    with open(path, "rb") as handle:
        return handle.read(SAMPLE)


def _refuse_other_files(where: str, sample: bytes) -> None:
    """Raise UsageError that names what a file is if it is no text."""
    for start, (what, advice) in OTHER_FILES.items():
        if sample.startswith(start):
            raise UsageError(f"{where}: is {what}, expected text; {advice}")


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line without its end) of the lines that are not blank."""
    with open_text(path) as handle:
        for number, line in enumerate(handle, 1):
            line = line.rstrip("\r\n")
            if line.strip():
                yield number, line
