"""Score texts and items with the matching head, in full and alone, for evaluations and the
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

TOKENS_AT_ONCE = 16384  # tokens of texts and regions per forward pass


def catalogue_of(
    corpus: Corpus,
    tokenizer: CaptionTokenizer,
    config: (
        ItemConfig | EvaluateProductSearchConfig | EvaluateRecommendationConfig | ScoreTopicsConfig
    ),
) -> Catalogue:
    """Return the items of a store, to be read as the settings say."""
    return Catalogue(corpus, tokenizer, config.titles, config.max_tokens, config.max_regions)


def catalogue_to_judge_by(config: ItemConfig, trained: Catalogue) -> Catalogue:
    """Return the items of --valid-data-path, else those that are trained on."""
    if not config.valid_data_path:
        return trained
    valid = open_stores([config.valid_data_path], config)
    trained.corpus.check_alike(valid.stores[0], config.allow_other_detector, "--valid-data-path")

    return catalogue_of(valid, trained.tokenizer, config)


class ItemScorer:
    """Score texts (token ids) and items of a catalogue, float32; higher is better.

    `match` computes the margin logit(matched) - logit(mismatched) of pairs in full. For sides that
    are encoded alone, the matching head is linear in the product of the two pooled vectors, so the
    margin is the dot product of a text vector and an item vector, up to a constant, and a search is
    a look-up in an index. Raises UsageError for a model with summed fusion.
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
                "a model with summed fusion has no vectors to search by; train one with product"
                " fusion"
            )

        self.model = model
        self.catalogue = catalogue
        self.device = device
        self.tokens_at_once = tokens_at_once
        weight = model.itm_head.weight.detach().float()
        self.direction = weight[0] - weight[1]

    def pieces(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of texts, cut to the catalogue's `max_tokens`."""
        tokens = self.catalogue.tokenizer.encode_batch(list(texts)).take(
            np.arange(len(texts)), self.catalogue.max_tokens
        )
        return np.split(tokens.ids.astype(np.int64), tokens.offsets[1:-1])

    @torch.no_grad()
    def text_vectors(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """Return the vectors of texts, [n, P]; their dot products with item vectors rank items."""
        rows = [self.catalogue.text_alone(text) for text in pieces]
        batches = self._batches(rows, np.full(len(rows), -1))
        found = [self.model(batch).pooled_text.float() * self.direction for batch in batches]
        return torch.cat(found).cpu().numpy()

    @torch.no_grad()
    def item_vectors(
        self, items: np.ndarray, progress: Callable[[int], None] = lambda items: None
    ) -> np.ndarray:
        """Return the vectors of items, [n, P]."""
        found = [np.zeros((0, self.model.config.pooled_size), np.float32)]

        for start in range(0, len(items), 1024):  # only one run's regions are in memory
            some = items[start : start + 1024]
            vectors = []
            for batch in self._batches(self.catalogue.items_alone(some), some):
                vectors.append(self.model(batch).pooled_image.float())
                progress(len(vectors[-1]))

            found.append(torch.cat(vectors).cpu().numpy())  # waits for the device, once per run

        return np.concatenate(found)

    @torch.no_grad()
    def match(
        self,
        pieces: Sequence[np.ndarray],
        text_of: np.ndarray,
        items: np.ndarray,
        progress: Callable[[int], None] = lambda pairs: None,
    ) -> np.ndarray:
        """Return the margins of pairs [n] of a text, by its index in `pieces`, and an item."""
        found = [torch.zeros(0, device=self.device)]

        for start in range(0, len(items), 1024):
            some = slice(start, start + 1024)
            rows = self.catalogue.in_full([pieces[t] for t in text_of[some]], items[some])
            for batch in self._batches(rows, items[some]):
                logits = self.model(batch).itm_logits
                found.append(logits[:, 0] - logits[:, 1])
                progress(len(found[-1]))

        return torch.cat(found).cpu().numpy()  # the only wait for the device

    def _batches(self, rows: Sequence[Text], items: np.ndarray) -> Iterator[PackedBatch]:
        """Yield the rows in batches of at most `tokens_at_once` tokens and regions, or one row."""
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
        """Return a batch of rows, sent to the device."""
        return send_batch(to_batch(self.catalogue.fields(rows, items)), self.device)
