"""Extract terms of captions (words, and n-grams inside runs of Chinese, Japanese or Korean
characters), and count them.
"""

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from megatron_interbert.errors import UsageError

CJK = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
ASCII_WORDS = re.compile("[a-z0-9]+")
RUNS = re.compile(f"([{CJK}]+)|((?:(?![{CJK}])[^\\W_])+)")
CHUNK = 65536  # captions whose terms are held as Python objects at a time


def kernels() -> ModuleType:
    """Import the compiled loops; raise UsageError without numba, which nothing else needs."""
    try:
        from megatron_interbert.preparation.mining import kernels
    except ImportError as error:
        raise UsageError(
            f"mining hard negatives needs the package numba ({error}): pip install numba"
        ) from error

    return kernels


def normalise(text: str) -> str:
    """Normalise a text by NFKC and lower case: for comparing texts and extracting terms."""
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).lower().strip()


def terms_of(text: str, ngrams: Sequence[int] = (1, 2)) -> list[str]:
    """Return the terms of a normalised text: words of letters and digits, and all n-grams of each
    run of CJK characters.

    A run shorter than the shortest n-gram is itself a term.
    """
    if text.isascii():
        return ASCII_WORDS.findall(text)

    terms: list[str] = []
    for run, word in RUNS.findall(text):
        if word:
            terms.append(word)
        elif len(run) < min(ngrams):
            terms.append(run)
        else:
            terms.extend(run[i : i + n] for n in ngrams for i in range(len(run) - n + 1))

    return terms


@dataclass
class Counts:
    """Hold the distinct terms of each caption with their counts.

    N captions, E entries, V terms numbered in order of first appearance.
    """

    starts: np.ndarray  # int64 [N + 1]
    terms: np.ndarray  # int32 [E]
    counts: np.ndarray  # uint16 [E]
    frequencies: np.ndarray  # int64 [V], captions that hold the term


def count_terms(captions: Iterable[str], ngrams: Sequence[int]) -> Counts:
    """Count the terms of all captions in one pass; besides the result, memory holds one chunk and
    the vocabulary.
    """
    vocabulary: dict[str, int] = {}
    parts: list[tuple[np.ndarray, ...]] = [
        _count_chunk(chunk, vocabulary, ngrams) for chunk in _chunks(captions)
    ]
    starts = np.zeros(sum(len(part[0]) for part in parts) + 1, dtype=np.int64)
    np.cumsum(np.concatenate([part[0] for part in parts]) if parts else [], out=starts[1:])
    joined = []

    for column, dtype in ((1, np.int32), (2, np.uint16)):
        joined.append(
            np.concatenate([part[column] for part in parts]) if parts else np.zeros(0, dtype)
        )

    frequencies = np.zeros(len(vocabulary), dtype=np.int64)
    kernels().add_document_frequencies(joined[0], frequencies)

    return Counts(starts, joined[0], joined[1], frequencies)


def _chunks(captions: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for caption in captions:
        chunk.append(normalise(caption))
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []

    if chunk:
        yield chunk


def _count_chunk(
    chunk: list[str], vocabulary: dict[str, int], ngrams: Sequence[int]
) -> tuple[np.ndarray, ...]:
    flat = array("i")
    lengths = array("i")

    for text in chunk:
        before = len(flat)
        flat.extend(
            [vocabulary.setdefault(term, len(vocabulary)) for term in terms_of(text, ngrams)]
        )
        lengths.append(len(flat) - before)

    terms = np.empty(len(flat), np.int32)
    counts = np.empty(len(flat), np.uint16)
    distinct = kernels().count_terms(_int32(flat), _int32(lengths), terms, counts)
    total = int(distinct.sum())

    return distinct, terms[:total].copy(), counts[:total].copy()


def _int32(values: array) -> np.ndarray:
    return np.frombuffer(values, dtype=np.int32) if len(values) else np.zeros(0, dtype=np.int32)
