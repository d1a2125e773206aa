"""Mine hard negatives by TF-IDF: for each caption, the most similar captions of other images whose
similarity is below a limit (the paper's rule).

The result depends only on the captions and the options, not on threads, blocks, or whether a
command was killed.
"""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.mining.index import TermIndex, build_index
from megatron_interbert.preparation.mining.terms import kernels
from megatron_interbert.preparation.mining.work import MiningFolder, finish_together, work_on
from megatron_interbert.preparation.sharing import ALONE, Claims, Team

SLICE = 64  # captions that a thread takes at a time
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@contextmanager
def no_progress(stage: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show no progress."""
    yield lambda done: None


@dataclass(frozen=True)
class MiningOptions:
    """Hold what determines the result, and `block`, the captions between two saves."""

    top: int = 30
    max_similarity: float = 0.5
    ngrams: tuple[int, ...] = (1, 2)
    block: int = 65_536

    def __post_init__(self) -> None:
        for name in ("top", "block"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)}: expected a number above 0")

        if not 0 < self.max_similarity <= 1:
            raise UsageError(f"--max-similarity {self.max_similarity}: expected above 0, up to 1")
        if not self.ngrams or not all(0 < n <= 8 for n in self.ngrams):
            raise UsageError(
                f"--ngrams {','.join(map(str, self.ngrams))}: expected lengths from 1 to 8, such"
                " as 1,2"
            )


class Searcher:
    """Find negatives in an index, with `threads` threads."""

    def __init__(self, index: TermIndex, options: MiningOptions, threads: int = 1) -> None:
        self.index = index
        self.options = options
        self.threads = threads
        self.loops = kernels()

    def search(
        self, captions: np.ndarray, progress: Callable[[int], object] = lambda done: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the negatives of `captions` [Q], int32 [Q, K] padded with -1, and their
        similarities, float64 [Q, K].

        `progress` is called with numbers of captions.
        """
        found = np.full((len(captions), self.options.top), -1, dtype=np.int32)
        scores = np.full((len(captions), self.options.top), -1.0)

        def work(start: int) -> int:
            part = slice(start, start + SLICE)
            self._search(captions[part], scores[part], found[part])
            return len(captions[part])

        with ThreadPoolExecutor(self.threads) as pool:
            for done in pool.map(work, range(0, len(captions), SLICE)):
                progress(done)

        return found, scores

    def _search(self, queries: np.ndarray, scores: np.ndarray, found: np.ndarray) -> None:
        index = self.index
        rows = (index.starts, index.entries)
        lists = (
            index.list_starts,
            index.places,
            index.impacts,
            index.norms,
            index.codes,
            index.amounts,
            index.tails,
        )
        captions = (index.holder_starts, index.holders, index.images)
        below = self.options.max_similarity
        self.loops.search(queries, below, index.row_of, rows, lists, captions, scores, found)

    def similarity(self, captions: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Compute the cosine of pairs of captions [P], float64; -1 for pairs whose other is -1."""
        index = self.index
        rows = np.where(others >= 0, index.row_of[others], -1)

        return self.loops.similarities(
            index.starts, index.entries, len(index.list_starts) - 1, index.row_of[captions], rows
        )


def mine(
    store: RegionStore,
    options: MiningOptions,
    threads: int = 1,
    restart: bool = False,
    overwrite: bool = False,
    examples: int = 0,
    progress: Progress = no_progress,
    team: Team = ALONE,
) -> dict[str, Any] | None:
    """Write hard_negatives.npy of a store (docs/region_store.md), resuming what an earlier call has
    left; return a summary.

    The summary has captions, negatives (per caption), without (captions with none), first and last
    (mean similarities), and examples. The processes of a `team` share the work; it is None in those
    that have not finished it.
    """
    folder = MiningFolder(store, dataclasses.asdict(options))
    if not store.num_captions:
        raise UsageError(f"{store.path}: has no captions to mine; build it with --captions")

    def work(claims: Claims | None) -> dict[str, Any] | None:
        searcher = Searcher(_index(store, options, progress), options, threads)
        _mine_blocks(folder, searcher, progress, claims)

        def finish(may_publish: Callable[[], bool]) -> dict[str, Any] | None:
            table = folder.assemble()
            summary = summarise(searcher, table)
            summary["examples"] = show(store, searcher, table, examples)
            if not may_publish():
                return None

            folder.publish(summary)
            return summary

        return finish_together(folder, finish, claims)

    return work_on(folder, team, restart, overwrite, work)


def _index(store: RegionStore, options: MiningOptions, progress: Progress) -> TermIndex:
    with progress("reading captions", store.num_captions) as advance:

        def captions() -> Iterator[str]:
            for number in range(store.num_captions):
                yield store.caption(number)
                if number % 4096 == 4095:
                    advance(4096)

            advance(store.num_captions % 4096)

        return build_index(captions(), store.caption_image, options.ngrams)


def _mine_blocks(
    folder: MiningFolder, searcher: Searcher, progress: Progress, claims: Claims | None
) -> None:
    left = sum(len(folder.rows_of(number)) for number in folder.missing())
    with progress("mining", left) as advance:
        folder.complete(
            lambda rows: searcher.search(np.arange(rows.start, rows.stop), progress=advance)[0],
            claims,
        )


def summarise(searcher: Searcher, table: np.ndarray) -> dict[str, Any]:
    """Count the negatives in a table int32 [captions, K], and compute the mean similarity of the
    first and of the last negative of each caption.
    """
    kept = 0
    first = 0.0
    last = 0.0
    filled = 0

    for start in range(0, len(table), 1 << 20):
        rows = np.asarray(table[start : start + (1 << 20)])
        counts = (rows >= 0).sum(axis=1)
        some = np.flatnonzero(counts)
        kept = kept + int(counts.sum())
        filled = filled + len(some)
        first += float(searcher.similarity(start + some, rows[some, 0]).sum())
        last += float(searcher.similarity(start + some, rows[some, counts[some] - 1]).sum())

    mean = kept / len(table)

    return {
        "captions": len(table),
        "negatives": mean,
        "without": len(table) - filled,
        "first": first / max(filled, 1),
        "last": last / max(filled, 1),
    }


def show(
    store: RegionStore, searcher: Searcher, table: np.ndarray, number: int, seed: int = 0
) -> list[str]:
    """Return lines with `number` random captions, each followed by its three hardest negatives and
    their similarities.
    """
    lines = []

    for caption in np.random.default_rng(seed).permutation(len(table))[:number]:
        others = np.asarray(table[caption, :3])
        lines.append(store.caption(int(caption)))
        for other, score in zip(
            others, searcher.similarity(np.full(len(others), caption), others), strict=True
        ):
            if other >= 0:
                lines.append(f"    {score:.3f}  {store.caption(int(other))}")

    return lines
