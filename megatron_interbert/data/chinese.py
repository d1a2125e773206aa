"""Normalise Chinese text to half-width letters and digits and simplified characters.

Shop titles mix forms that mean the same: Ａ４ and A4, 連衣裙 and 连衣裙. Full-width punctuation
stays, because the vocabulary and weights of bert-base-chinese know that form.
"""

import functools
from typing import Any

from megatron_interbert.errors import UsageError

HALF_WIDTH = {0xFF00 + code - 0x20: code for code in range(0x21, 0x7F) if chr(code).isalnum()} | {
    0x3000: 0x20
}


@functools.cache
def _simplifier() -> Any:
    try:
        import opencc
    except ImportError:
        raise UsageError(
            "Chinese text needs OpenCC: pip install 'megatron_interbert[chinese]'"
        ) from None

    return opencc.OpenCC("t2s")


@functools.cache
def _segmenter() -> Any:
    try:
        import jieba
    except ImportError:
        raise UsageError("--segmenter jieba needs the package jieba: pip install jieba") from None

    jieba.setLogLevel("WARNING")
    jieba.initialize()

    return jieba


def word_begins(text: str) -> set[int]:
    """Return the positions in a text at which a Chinese word begins, by jieba's dictionary."""
    return {begin for _, begin, _ in _segmenter().tokenize(text)}


def one_form(text: str) -> str:
    """Return the text with full-width letters, digits and spaces made half-width and traditional
    characters simplified.
    """
    return _simplifier().convert(text.translate(HALF_WIDTH))
