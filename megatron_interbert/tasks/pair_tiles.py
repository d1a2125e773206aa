"""All pairs of a store's images and captions, tile by tile: shared out over ranks, kept on disk, gone on with after a stop.

A tile is a run of captions (sorted by length) times a run of images. Memory holds one tile; disk holds the scores, 4 bytes a
pair. Data-parallel ranks take tiles in turn, the ranks of a tensor-parallel group work on the same one.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.downstream.pairs import NOTHING, caption_texts, pair_fields
from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.region_batch import read_regions
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError, local_errors
from megatron_interbert.files import HELD, new_file
from megatron_interbert.model.pair_scorer import PairScorer, Side
from megatron_interbert.parallel.state import ParallelState

PREFIX = "tiles-"


@dataclass
class Pairs:
    """What is scored: captions [C] and images [I] of a corpus by their numbers, and how they are read."""

    corpus: Corpus
    tokenizer: CaptionTokenizer
    captions: np.ndarray
    images: np.ndarray
    max_regions: int
    max_tokens: int

    def own_image(self) -> np.ndarray:
        """int64 [C]: place in `images` of each caption's own image."""
        return np.searchsorted(self.images, self.corpus.caption_image[self.captions])

    def image_side(self, scorer: PairScorer, part: np.ndarray, device: torch.device) -> Side:
        """Some of the images made ready."""
        regions = read_regions(self.corpus, self.images[part], self.max_regions)
        nothing = (np.array([self.tokenizer.cls]), np.zeros(1, np.int64))
        fields = pair_fields([nothing] * len(part), regions, np.arange(len(part)), self.corpus.feature_dim)
        return scorer.images(to_batch(fields), device)

    def caption_side(self, scorer: PairScorer, part: np.ndarray, device: torch.device) -> Side:
        """Some of the captions made ready."""
        texts = caption_texts(self.corpus, self.tokenizer, self.captions[part], self.max_tokens)
        return scorer.captions(to_batch(pair_fields(texts, None, NOTHING, self.corpus.feature_dim)), device)

    def by_length(self) -> np.ndarray:
        """int64 [C]: captions from short to long, so that those of a batch are alike."""
        lengths = np.diff(self.corpus.tokens(self.captions, self.tokenizer, self.max_tokens - 2).offsets)
        return np.argsort(lengths, kind="stable")

    def by_regions(self) -> np.ndarray:
        """int64 [I]: images from few regions to many."""
        return np.argsort(np.minimum(self.corpus.region_counts[self.images], self.max_regions), kind="stable")


@torch.no_grad()
def score_block(scorer: PairScorer, images: Side, captions: Side, pairs_per_batch: int) -> torch.Tensor:
    """float32 [captions, images] on the device: all pairs of two sides, about so many at a time. Nobody waits for them here."""
    result = torch.empty(len(captions), len(images), device=images.hidden.device)
    width = min(len(images), pairs_per_batch)
    height = max(1, pairs_per_batch // width)
    for top, bottom in runs_of_one_length(captions, height):
        rows = np.arange(top, bottom)
        for left in range(0, len(images), width):
            right = min(left + width, len(images))
            columns = np.arange(left, right)
            margins = scorer.margins(images, captions, np.tile(columns, len(rows)), np.repeat(rows, len(columns)))
            result[top:bottom, left:right] = margins.view(len(rows), len(columns))
    return result


def runs_of_one_length(side: Side, most: int) -> list[tuple[int, int]]:
    """(first, last + 1) of runs of at most `most` neighbours of equal length, so that nothing is padded inside the attention."""
    lengths = side.lengths
    runs, first = [], 0
    for item in range(1, len(lengths) + 1):
        if item == len(lengths) or lengths[item] != lengths[first] or item - first == most:
            runs.append((first, item))
            first = item
    return runs


class ScoreTiles:
    """Tiles of [captions, images] in a folder of their own inside `parent`; a tile that is there is not scored again.

    `identity` says of what they are: other weights, data or settings have another folder. One evaluation at a time works in it;
    folders that stopped evaluations have left and nobody works in are removed.
    """

    def __init__(
        self, parent: Path, shape: tuple[int, int], tile: tuple[int, int], identity: dict, state: ParallelState | None = None
    ) -> None:
        self.shape, self.tile, self.state = shape, tile, state or ParallelState()
        plan = json.dumps({"shape": list(shape), "tile": list(tile), "identity": identity}, sort_keys=True)
        self.folder = parent / f"{PREFIX}{hashlib.sha256(plan.encode()).hexdigest()[:16]}"
        self._lock: int | None = None
        problem = self._claim(parent) if self.state.is_main else None
        problem = self.state.gather(problem)[0]
        if problem:
            raise UsageError(problem)
        self.places = [(top, left) for top in range(0, shape[0], tile[0]) for left in range(0, shape[1], tile[1])]

    def _claim(self, parent: Path) -> str | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder)
        if self._lock is None:
            return f"{self.folder}: the same evaluation is running there; wait for it, or give another --output"
        for left in parent.glob(f"{PREFIX}*"):
            if left != self.folder and (handle := _locked(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)
        return None

    def release(self) -> None:
        """Give the folder back; the tiles stay."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _file(self, place: tuple[int, int]) -> Path:
        return self.folder / f"scores-{place[0]:08d}-{place[1]:08d}.npy"

    def missing(self) -> list[tuple[int, int]]:
        """Places (first caption, first image) of tiles that are not there yet."""
        found = [self._file(place).is_file() for place in self.places]
        found = self.state.gather(found)[0]  # what the first rank sees: all must agree on who does what
        return [place for place, there in zip(self.places, found, strict=True) if not there]

    def share(self, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those that this rank scores."""
        return places[self.state.data_rank :: self.state.data_size]

    def write(self, place: tuple[int, int], scores: np.ndarray) -> None:
        """One finished tile; it appears whole."""
        if self.state.tensor_rank:
            return
        beside = self._file(place).with_suffix(f".{os.getpid()}.new")
        with new_file(beside) as handle:
            np.save(handle, scores)
        os.replace(beside, self._file(place))

    def extent(self, place: tuple[int, int]) -> tuple[slice, slice]:
        """Captions and images of a tile."""
        return tuple(slice(p, min(p + t, s)) for p, t, s in zip(place, self.tile, self.shape, strict=True))

    def pairs(self, place: tuple[int, int]) -> int:
        """Pairs of a tile."""
        rows, columns = self.extent(place)
        return (rows.stop - rows.start) * (columns.stop - columns.start)

    def read(self) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """All tiles: captions, images, scores."""
        for place in self.places:
            yield *self.extent(place), np.load(self._file(place), allow_pickle=False)

    def remove(self) -> None:
        """The folder with all tiles."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()


def _locked(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed; None when somebody has it. OSError on a disk without locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in HELD:
            return None
        raise
    return handle


def fill(
    tiles: ScoreTiles,
    places: list[tuple[int, int]],
    pairs: Pairs,
    scorer: PairScorer,
    device: torch.device,
    pairs_per_batch: int,
    progress: Callable[[int], None] = lambda pairs: None,
) -> None:
    """Score some tiles. Rows and columns of the tiles are in the order of `by_length` and `by_regions`."""
    captions, images = pairs.by_length(), pairs.by_regions()
    ready: tuple[int, Side] | None = None
    for top, left in places:
        rows, columns = tiles.extent((top, left))
        with local_errors():
            if ready is None or ready[0] != top:  # tiles of the same captions follow each other
                ready = top, pairs.caption_side(scorer, captions[rows], device)
            side = pairs.image_side(scorer, images[columns], device)
        scores = score_block(scorer, side, ready[1], pairs_per_batch)
        tiles.write((top, left), scores.cpu().numpy())
        progress(scores.numel())
