"""Recognise text that is not UTF-8, and say how to convert it."""

import codecs
import re
from pathlib import Path

SAMPLE = 1 << 20  # bytes by which the encoding is judged
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CHINESE = re.compile("[\u3400-\u9fff]")
HIGH = re.compile(rb"[\x80-\xff]")
LONE = re.compile(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])")  # a byte between ASCII ones
FEW = 3  # such bytes; fewer may be damage
FREQUENT = {  # encoding -> first bytes of the letters that are frequent in it
    "GB18030": range(0xB0, 0xD8),
    "BIG5": range(0xA4, 0xC7),
}


def guess_encoding(sample: bytes) -> str:
    """Guess the encoding of the start of a text file; empty if it is UTF-8, with a few damaged
    lines perhaps, or unknown.
    """
    if sample.startswith(UTF_16):
        return "UTF-16"
    if 10 * sample.count(0) > len(sample):
        return "UTF-16LE" if sample[1::2].count(0) > sample[::2].count(0) else "UTF-16BE"

    foreign = [line for line in _whole_lines(sample) if not line.isascii()]
    wrong = [line for line in foreign if not _is_utf_8(line)]
    if 2 * len(wrong) <= len(foreign):
        return ""

    return _encoding_of(b"\n".join(wrong)) if wrong else ""


def _encoding_of(wrong: bytes) -> str:
    """Guess the encoding of text that is not UTF-8: single letters with accents among ASCII, or the
    one in which most letters are frequent ones.
    """
    lone = len(LONE.findall(wrong))
    if lone >= FEW and 4 * lone > 3 * len(HIGH.findall(wrong)):
        return "WINDOWS-1252"

    shares = {name: _share_of_frequent(wrong, name) for name in FREQUENT}
    best = max(shares, key=shares.__getitem__)

    return best if shares[best] > 0.5 else ""


def how_to_convert(path: str | Path, encoding: str) -> str:
    """Return the words that say what a file seems to be, and the command that converts it."""
    path = Path(path)
    return (
        f"is not UTF-8 text but looks like {encoding}; convert it: iconv -f {encoding} -t UTF-8"
        f" '{path}' > '{path.stem}-utf8{path.suffix}'"
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
    """Return how much of what is not ASCII are frequent letters; 0 if it is another encoding."""
    try:
        decoded = text.decode(encoding)
    except UnicodeDecodeError:
        return 0.0

    first = [letter.encode(encoding)[0] for letter in decoded if not letter.isascii()]
    frequent = FREQUENT[encoding]

    return sum(byte in frequent for byte in first) / max(len(first), 1)
