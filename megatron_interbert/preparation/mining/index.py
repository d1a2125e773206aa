"""Build the TF-IDF rows of captions, and their inverted lists, sorted so that a search can stop
early.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_interbert.preparation.mining.terms import Counts, count_terms, kernels

# a term beside its weight, as both are read at the same time from rows anywhere in memory
ENTRY = np.dtype([("term", np.int32), ("weight", np.float32)])


@dataclass
class TermIndex:
    """Hold TF-IDF rows, and lists of rows by term.

    Captions with the same terms share one row. Terms are numbered by falling frequency, so that a
    row's rarest term is its last. Rows are in the order of their rarest term's number: those of
    frequent words, which most searches read, are near each other in memory. The list of a term is
    sorted by falling norm of the row up to the term (in steps of 1 / LEVELS); beside each entry is
    a sketch of what comes before it in its row (kernels.describe).
    """

    row_of: np.ndarray  # int32 [N], the row of each caption
    images: np.ndarray  # int64 [N]
    holder_starts: np.ndarray  # int64 [R + 1]
    holders: np.ndarray  # int32 [N], the captions of each row, in order
    starts: np.ndarray  # int64 [R + 1]
    entries: np.ndarray  # ENTRY [E + R], the rows, each followed by an entry with the term V
    list_starts: np.ndarray  # int64 [V + 1]
    places: np.ndarray  # int32 [E], where the row starts; int64 if that is too small
    impacts: np.ndarray  # float32 [E]
    norms: np.ndarray  # float32 [E], of the row up to the term
    codes: np.ndarray  # uint8 [E, SKETCHED]
    amounts: np.ndarray  # uint8 [E, SKETCHED]
    tails: np.ndarray  # float32 [E]


def build_index(
    captions: Iterable[str], images: np.ndarray, ngrams: Sequence[int] = (1, 2)
) -> TermIndex:
    """Build the TF-IDF rows of all captions and their inverted lists.

    A weight is the raw count x (ln((1 + N) / (1 + df)) + 1); rows are normalised to length 1.
    """
    counted = count_terms(captions, ngrams)
    rank = np.empty(len(counted.frequencies), dtype=np.int32)
    rank[np.argsort(-counted.frequencies, kind="stable")] = np.arange(len(rank), dtype=np.int32)
    row_of, holder_starts, holders = _shared_rows(counted, rank)
    starts, entries = _weighted_rows(counted, rank, holders[holder_starts[:-1]])
    vocabulary = len(counted.frequencies)
    del counted

    return TermIndex(
        row_of,
        np.asarray(images, dtype=np.int64),
        holder_starts,
        holders,
        starts,
        entries,
        *_lists(starts, entries, vocabulary),
    )


def _starts(members: np.ndarray, groups: int) -> np.ndarray:
    """Return where each group begins, int64 [groups + 1], if `members` were sorted by group."""
    starts = np.zeros(groups + 1, np.int64)
    np.cumsum(np.bincount(members, minlength=groups), out=starts[1:])

    return starts


def _shared_rows(counted: Counts, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the row of each caption, and the captions of each row as starts and numbers."""
    loops = kernels()
    entries = (counted.starts, counted.terms, counted.counts)
    order = np.argsort(loops.row_keys(*entries, rank), kind="stable").astype(np.int32)
    row_of = np.empty(len(order), np.int32)
    rows = loops.number_rows(*entries, order, row_of)

    return row_of, _starts(row_of, rows), order


def _weighted_rows(
    counted: Counts, rank: np.ndarray, examples: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and entries of the rows of the example captions [R]."""
    idf = np.log(len(counted.starts) / (1 + counted.frequencies)) + 1  # starts has N + 1
    sizes = counted.starts[examples + 1] - counted.starts[examples]
    starts = np.empty(len(examples) + 1, np.int64)
    entries = np.empty(int(sizes.sum()) + len(examples), ENTRY)
    kernels().write_rows(
        counted.starts, counted.terms, counted.counts, idf, rank, examples, starts, entries
    )

    return starts, entries


def _lists(starts: np.ndarray, entries: np.ndarray, vocabulary: int) -> tuple[np.ndarray, ...]:
    """Return list_starts [V + 1], then places, impacts, norms, codes, amounts and tails of all
    entries, sorted by list.
    """
    loops = kernels()
    number = len(entries) - (len(starts) - 1)
    terms = np.empty(number, np.int32)
    columns = (
        np.empty(number, np.int32 if len(entries) < 1 << 31 else np.int64),
        np.empty(number, np.float32),
        np.empty(number, np.float32),
        np.zeros((number, loops.SKETCHED), np.uint8),
        np.zeros((number, loops.SKETCHED), np.uint8),
        np.empty(number, np.float32),
    )
    loops.describe(starts, entries, terms, *columns)
    order = np.lexsort((-(columns[2] * loops.LEVELS).astype(np.int16), terms))

    return _starts(terms, vocabulary), *(column[order] for column in columns)
