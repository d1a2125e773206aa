"""Scores of texts and items by the matching head, in full and alone; for evaluations and the
service.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import PackedBatch, to_batch
from megatron_interbert.data.sending import send_batch
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.tasks.pairs import Text
from megatron_interbert.tasks.parts import open_stores
from megatron_interbert.tasks.shop.catalogue import Catalogue
from megatron_interbert.tasks.shop.config import (
    EvaluateProductSearchConfig,
    EvaluateRecommendationConfig,
    ItemConfig,
    ScoreTopicsConfig,
)

TOKENS_AT_ONCE = 16384  # of texts and regions in a forward pass


def catalogue_of(
    corpus: Corpus,
    tokenizer: CaptionTokenizer,
    config: (
        ItemConfig | EvaluateProductSearchConfig | EvaluateRecommendationConfig | ScoreTopicsConfig
    ),
) -> Catalogue:
    """Give the items of a store as a run reads them."""
    return Catalogue(corpus, tokenizer, config.titles, config.max_tokens, config.max_regions)


def catalogue_to_judge_by(config: ItemConfig, trained: Catalogue) -> Catalogue:
    """Give the items of --valid-data-path, else those that are trained on."""
    if not config.valid_data_path:
        return trained
    valid = open_stores([config.valid_data_path], config)
    trained.corpus.check_alike(valid.stores[0], config.allow_other_detector, "--valid-data-path")

    return catalogue_of(valid, trained.tokenizer, config)


class ItemScorer:
    """Scores of texts (token ids) and items of a catalogue, float32; higher is better.

    `match` is the margin logit(matched) - logit(mismatched) of a pair in full. Alone, the matching
    head is linear in the product of the two pooled vectors, so the margin of a pair is the dot
    product of a text's and an item's vector, and a search through an index.
    """

    def __init__(
        self,
        model: InterBert,
        catalogue: Catalogue,
        device: torch.device,
        tokens_at_once: int = TOKENS_AT_ONCE,
    ) -> None:
        if model.config.fusion != "product":
            raise UsageError(
                "a model with summed fusion has no vectors to search by; train one with the product"
            )

        self.model = model
        self.catalogue = catalogue
        self.device = device
        self.tokens_at_once = tokens_at_once
        weight = model.itm_head.weight.detach().float()
        self.direction = weight[0] - weight[1]

    def pieces(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Give token ids of texts."""
        tokens = self.catalogue.tokenizer.encode_batch(list(texts)).take(
            np.arange(len(texts)), self.catalogue.max_tokens
        )
        return np.split(tokens.ids.astype(np.int64), tokens.offsets[1:-1])

    @torch.no_grad()
    def text_vectors(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """Give [n, P]: vectors of texts, to be multiplied with those of items."""
        rows = [self.catalogue.text_alone(text) for text in pieces]
        batches = self._batches(rows, np.full(len(rows), -1))
        found = [self.model(batch).pooled_text.float() * self.direction for batch in batches]
        return torch.cat(found).cpu().numpy()

    @torch.no_grad()
    def item_vectors(
        self, items: np.ndarray, progress: Callable[[int], None] = lambda items: None
    ) -> np.ndarray:
        """Give [n, P]: vectors of items."""
        found = [np.zeros((0, self.model.config.pooled_size), np.float32)]

        for start in range(0, len(items), 1024):  # regions of a run of items are in memory at once
            some = items[start : start + 1024]
            vectors = []
            for batch in self._batches(self.catalogue.items_alone(some), some):
                vectors.append(self.model(batch).pooled_image.float())
                progress(len(vectors[-1]))

            found.append(torch.cat(vectors).cpu().numpy())  # the one wait for a run

        return np.concatenate(found)

    @torch.no_grad()
    def match(
        self,
        pieces: Sequence[np.ndarray],
        text_of: np.ndarray,
        items: np.ndarray,
        progress: Callable[[int], None] = lambda pairs: None,
    ) -> np.ndarray:
        """Give [n]: margins of pairs of a text, by its place in `pieces`, and an item."""
        found = [torch.zeros(0, device=self.device)]

        for start in range(0, len(items), 1024):
            some = slice(start, start + 1024)
            rows = self.catalogue.in_full([pieces[t] for t in text_of[some]], items[some])
            for batch in self._batches(rows, items[some]):
                logits = self.model(batch).itm_logits
                found.append(logits[:, 0] - logits[:, 1])
                progress(len(found[-1]))

        return torch.cat(found).cpu().numpy()  # the one wait for the device

    def _batches(self, rows: Sequence[Text], items: np.ndarray) -> Iterator[PackedBatch]:
        """Run of rows of about `tokens_at_once` tokens and regions; at least one row in each."""
        regions = self.catalogue.region_counts(items)
        cost = np.array([len(ids) for ids, _ in rows]) + regions + (regions > 0)
        first = 0
        total = 0

        for row, tokens in enumerate(cost.tolist()):
            if row > first and total + tokens > self.tokens_at_once:
                yield self._sent(rows[first:row], items[first:row])
                first = row
                total = 0

            total += tokens

        if len(rows):
            yield self._sent(rows[first:], items[first:])

    def _sent(self, rows: Sequence[Text], items: np.ndarray) -> PackedBatch:
        """Give a batch of rows on the device."""
        return send_batch(to_batch(self.catalogue.fields(rows, items)), self.device)
