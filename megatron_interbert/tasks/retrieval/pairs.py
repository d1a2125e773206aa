"""Prepare images and captions, and score their pairs block by block."""

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
    """Hold what is scored: captions [C] and images [I] of a corpus, by number, and the limits on
    regions and tokens.
    """

    corpus: Corpus
    tokenizer: CaptionTokenizer
    captions: np.ndarray
    images: np.ndarray
    max_regions: int
    max_tokens: int

    def own_image(self) -> np.ndarray:
        """Return the index in `images` of each caption's own image, int64 [C]."""
        return np.searchsorted(self.images, self.corpus.caption_image[self.captions])

    def image_side(self, scorer: PairScorer, part: np.ndarray, device: torch.device) -> Side:
        """Return some of the images, prepared for scoring; `part` indexes `images`."""
        regions = read_regions(self.corpus, self.images[part], self.max_regions)
        nothing = (np.array([self.tokenizer.cls]), np.zeros(1, np.int64))
        fields = pair_fields(
            [nothing] * len(part), regions, np.arange(len(part)), self.corpus.feature_dim
        )

        return scorer.images(to_batch(fields), device)

    def caption_side(self, scorer: PairScorer, part: np.ndarray, device: torch.device) -> Side:
        """Return some of the captions, prepared for scoring; `part` indexes `captions`."""
        texts = caption_texts(self.corpus, self.tokenizer, self.captions[part], self.max_tokens)
        return scorer.captions(
            to_batch(pair_fields(texts, None, NOTHING, self.corpus.feature_dim)), device
        )

    def by_length(self) -> np.ndarray:
        """Return the order of captions from short to long, int64 [C], so that those of a batch have
        similar lengths.
        """
        lengths = np.diff(
            self.corpus.tokens(self.captions, self.tokenizer, self.max_tokens - 2).offsets
        )
        return np.argsort(lengths, kind="stable")

    def by_regions(self) -> np.ndarray:
        """Return the order of images from few regions to many, int64 [I]."""
        return np.argsort(
            np.minimum(self.corpus.region_counts[self.images], self.max_regions), kind="stable"
        )


@torch.no_grad()
def score_block(
    scorer: PairScorer, images: Side, captions: Side, pairs_per_batch: int
) -> torch.Tensor:
    """Score all pairs of two sides, about `pairs_per_batch` at a time: float32 [captions, images].

    The scores stay on the device, and the host does not wait for them.
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
    """Return (first, last + 1) of runs of at most `most` consecutive items of equal length, so that
    nothing is padded inside the attention.
    """
    lengths = side.lengths
    runs = []
    first = 0

    for item in range(1, len(lengths) + 1):
        if item == len(lengths) or lengths[item] != lengths[first] or item - first == most:
            runs.append((first, item))
            first = item

    return runs
