"""Open text files as people have them: UTF-8 with or without a byte order mark, any line ends.

Other encodings are refused with the command that converts them.
"""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import reading

SAMPLE = 1 << 20  # bytes by which the encoding is judged
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UNPACK = "unpack it and give what is in it"
OTHER_FILES = {  # first bytes -> what a file is, what to do
    b"\x1f\x8b": ("compressed (gzip)", UNPACK),
    b"PK\x03\x04": ("an archive or a spreadsheet (zip)", f"{UNPACK}, or save the sheet as CSV"),
    b"BZh": ("compressed (bzip2)", UNPACK),
    b"\xfd7zXZ": ("compressed (xz)", UNPACK),
    b"\x93NUMPY": ("a NumPy array", "give the file with the captions"),
    b"\x89HDF": ("an HDF5 file", "give the file with the captions"),
    b"\x80": ("a pickle", "write its captions as JSON"),
    b"\xff\xd8\xff": ("a photo", "give the file with the captions"),
    b"\x89PNG": ("a photo", "give the file with the captions"),
    b"version https://git-lfs": ("a placeholder of Git LFS", "run: git lfs pull"),
    b"<!DOCTYPE": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
}
CHINESE = re.compile("[\u3400-\u9fff]")


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
        _refuse_other_encodings(f"{what}{path}", path, sample)
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


def _refuse_other_encodings(where: str, path: str | Path, sample: bytes) -> None:
    """Raise UsageError for UTF-16, and for Chinese text that is not UTF-8.

    A single line that is not UTF-8 is damaged, and is reported when it is read.
    """
    name = "UTF-16" if sample.startswith(UTF_16) else ""

    if not name:
        foreign = [line for line in _whole_lines(sample) if not line.isascii()]
        wrong = [line for line in foreign if not _is_utf_8(line)]
        if 2 * len(wrong) > len(foreign):
            name = _guess_encoding(b"\n".join(wrong))

    if name:
        raise UsageError(
            f"{where}: is not UTF-8 text but looks like {name}; convert it: iconv -f"
            f" {name} -t UTF-8 '{path}' > '{Path(path).stem}-utf8{Path(path).suffix}'"
        )


def _whole_lines(sample: bytes) -> list[bytes]:
    """Split a sample into lines, without the end that it may have cut off."""
    lines = sample.split(b"\n")
    if len(sample) == SAMPLE:
        lines[-1] = lines[-1][: lines[-1].rfind(b'"') + 1]

    return lines


def _is_utf_8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False

    return True


def _guess_encoding(wrong: bytes) -> str:
    """Guess in which encoding text that is not UTF-8 is Chinese; empty if in none."""
    for name in ("GB18030", "BIG5"):
        try:
            text = wrong.decode(name)
        except UnicodeDecodeError:
            continue

        chinese = len(CHINESE.findall(text))
        if 2 * chinese > sum(not letter.isascii() for letter in text):
            return name

    return ""


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line without its end) of the lines that are not blank."""
    with open_text(path) as handle:
        for number, line in enumerate(handle, 1):
            line = line.rstrip("\r\n")
            if line.strip():
                yield number, line


def clean_caption(text: str) -> str:
    """Return a caption on one line, with single spaces, and with `?` for what is no character."""
    line = " ".join(text.replace("\0", " ").split())
    return line.encode("utf-8", "replace").decode("utf-8")
