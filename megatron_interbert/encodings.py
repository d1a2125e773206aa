"""Recognise text that is not UTF-8, and say how to convert it."""

import codecs
import re
import shlex
from pathlib import Path

SAMPLE = 1 << 20  # bytes by which the encoding is judged
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
PRINTABLE = 0.95  # the share of letters of a text that are, at least
HIGH = re.compile(rb"[\x80-\xff]+")
# letters with accents: one byte between ASCII, or two between letters
ACCENTED = re.compile(
    rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])|(?<=[A-Za-z])[\x80-\xff]{2}(?=[A-Za-z ,.\r\n])"
)
FEW = 3  # such letters; fewer may be damage
MOSTLY = 0.75
HALF = 0.5  # old characters are not frequent ones
FREQUENT = {  # encoding -> first bytes of the letters that are frequent in it
    "EUC-KR": (range(0xB0, 0xC9),),
    "EUC-JP": (range(0xA4, 0xA6), range(0xB0, 0xD0)),
    "SHIFT_JIS": (range(0x82, 0x84), range(0x88, 0x98)),
    "GB18030": (range(0xB0, 0xD8),),
    "BIG5": (range(0xA4, 0xC7),),
}


def guess_encoding(sample: bytes) -> str:
    """Guess the encoding of the start of a text file; empty if it is UTF-8, with a few damaged
    lines perhaps, or unknown.
    """
    if sample.startswith(UTF_16):
        return "UTF-16"
    if 10 * sample.count(0) > len(sample):
        little = sample[1::2].count(0) > sample[::2].count(0)
        return _if_printable(sample, "UTF-16LE" if little else "UTF-16BE")

    foreign = [line for line in _whole_lines(sample) if not line.isascii()]
    wrong = [line for line in foreign if not _is_utf_8(line)]
    if 2 * len(wrong) <= len(foreign):
        return ""

    return _encoding_of(b"\n".join(wrong))


def _if_printable(sample: bytes, encoding: str) -> str:
    """Return the encoding if it makes text of a sample, or ""."""
    text = sample[: len(sample) // 2 * 2].decode(encoding, "replace")
    letters = sum(letter.isprintable() or letter.isspace() for letter in text)

    return encoding if letters > PRINTABLE * len(text) else ""


def _encoding_of(wrong: bytes) -> str:
    """Guess the encoding of text that is not UTF-8: letters with accents among ASCII, or the one in
    which most letters are frequent ones.
    """
    accented = ACCENTED.findall(wrong)
    high = sum(map(len, HIGH.findall(wrong)))
    if len(accented) >= FEW and sum(map(len, accented)) > MOSTLY * high:
        return "WINDOWS-1252"

    shares = {name: _share_of_frequent(wrong, name) for name in FREQUENT}
    best = max(shares, key=shares.__getitem__)

    return best if shares[best] > HALF else ""


def how_to_convert(path: str | Path, encoding: str) -> str:
    """Return the words that say what a file seems to be, and the command that converts it."""
    path = Path(path)
    new = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return (
        f"is not UTF-8 text but looks like {encoding}; convert it: iconv -f {encoding} -t UTF-8"
        f" {shlex.quote(str(path))} > {shlex.quote(str(new))}"
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


def _share_of_frequent(text: bytes, encoding: str) -> float:
    """Return how many of the letters that are not ASCII are frequent in an encoding."""
    letters = [letter for letter in text.decode(encoding, "replace") if not letter.isascii()]
    first = [letter.encode(encoding, "ignore")[:1] for letter in letters]
    frequent = {byte for part in FREQUENT[encoding] for byte in part}

    return sum(byte[0] in frequent for byte in first if byte) / max(len(letters), 1)
