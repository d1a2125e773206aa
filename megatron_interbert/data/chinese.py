"""One way to write Chinese text: half-width letters and digits, simplified characters.

Shop titles mix forms that mean the same: Ａ４ and A4, 連衣裙 and 连衣裙. Full-width punctuation
stays: it is what the vocabulary of bert-base-chinese and its weights know.
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
        raise UsageError("--segmenter jieba needs it: pip install jieba") from None

    jieba.setLogLevel("WARNING")
    jieba.initialize()

    return jieba


def word_begins(text: str) -> set[int]:
    """Give places in a text where a Chinese word begins, by jieba's dictionary."""
    return {begin for _, begin, _ in _segmenter().tokenize(text)}


def one_form(text: str) -> str:
    """Give the text with full-width letters, digits and spaces as half-width ones, and traditional
    characters as simplified ones.
    """
    return _simplifier().convert(text.translate(HALF_WIDTH))
