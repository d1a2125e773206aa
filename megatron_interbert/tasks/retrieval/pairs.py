"""Pairs of images and captions made ready and scored, a block at a time."""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.region_batch import read_regions
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.model.pair_scorer import PairScorer, Side
from megatron_interbert.tasks.pairs import NOTHING, caption_texts, pair_fields


@dataclass
class Pairs:
    """What is scored: captions [C] and images [I] of a corpus by their numbers, and how they are
    read.
    """

    corpus: Corpus
    tokenizer: CaptionTokenizer
    captions: np.ndarray
    images: np.ndarray
    max_regions: int
    max_tokens: int

    def own_image(self) -> np.ndarray:
        """Give int64 [C]: place in `images` of each caption's own image."""
        return np.searchsorted(self.images, self.corpus.caption_image[self.captions])

    def image_side(self, scorer: PairScorer, part: np.ndarray, device: torch.device) -> Side:
        """Give some of the images made ready."""
        regions = read_regions(self.corpus, self.images[part], self.max_regions)
        nothing = (np.array([self.tokenizer.cls]), np.zeros(1, np.int64))
        fields = pair_fields(
            [nothing] * len(part), regions, np.arange(len(part)), self.corpus.feature_dim
        )

        return scorer.images(to_batch(fields), device)

    def caption_side(self, scorer: PairScorer, part: np.ndarray, device: torch.device) -> Side:
        """Give some of the captions made ready."""
        texts = caption_texts(self.corpus, self.tokenizer, self.captions[part], self.max_tokens)
        return scorer.captions(
            to_batch(pair_fields(texts, None, NOTHING, self.corpus.feature_dim)), device
        )

    def by_length(self) -> np.ndarray:
        """Give int64 [C]: captions from short to long, so that those of a batch are alike."""
        lengths = np.diff(
            self.corpus.tokens(self.captions, self.tokenizer, self.max_tokens - 2).offsets
        )
        return np.argsort(lengths, kind="stable")

    def by_regions(self) -> np.ndarray:
        """Give int64 [I]: images from few regions to many."""
        return np.argsort(
            np.minimum(self.corpus.region_counts[self.images], self.max_regions), kind="stable"
        )


@torch.no_grad()
def score_block(
    scorer: PairScorer, images: Side, captions: Side, pairs_per_batch: int
) -> torch.Tensor:
    """Score float32 [captions, images] on the device: all pairs of two sides, about so many at a
    time.

    Nobody waits for them here.
    """
    result = torch.empty(len(captions), len(images), device=images.hidden.device)
    width = min(len(images), pairs_per_batch)
    height = max(1, pairs_per_batch // width)

    for top, bottom in runs_of_one_length(captions, height):
        rows = np.arange(top, bottom)
        for left in range(0, len(images), width):
            right = min(left + width, len(images))
            columns = np.arange(left, right)
            margins = scorer.margins(
                images, captions, np.tile(columns, len(rows)), np.repeat(rows, len(columns))
            )
            result[top:bottom, left:right] = margins.view(len(rows), len(columns))

    return result


def runs_of_one_length(side: Side, most: int) -> list[tuple[int, int]]:
    """Give (first, last + 1) of runs of at most `most` neighbours of equal length, so that nothing
    is padded inside the attention.
    """
    lengths = side.lengths
    runs = []
    first = 0

    for item in range(1, len(lengths) + 1):
        if item == len(lengths) or lengths[item] != lengths[first] or item - first == most:
            runs.append((first, item))
            first = item

    return runs
