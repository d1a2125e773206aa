"""Read queries and the products that they are for, and make the training samples of product search.

A sample is a query with one of its products. Five pairs are scored in full:

    right           the query and the product                         class 0
    other query     a query that is not for the product, and it       class 1
    other product   the query, and a product that it is not for       class 1
    near product    the query, and a wrong product near the product   class 1
    near query      a wrong query for a near product, and the product class 1

Near products are the 100 whose mean features are nearest (hard_images.npy); if none were mined, the
last two pairs are random as well. Encoded alone, the query chooses among these three products and
32 more, which all samples of an optimizer step share (shared negatives as in dense retrieval, arXiv
2004.04906, but independent of the micro-batch); other products that it is for are masked out.

All draws are keyed by (seed, step, sample), so every rank, worker, restart and layout makes the
same pairs.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_interbert.data.order import StepOrder
from megatron_interbert.data.randomness import uniforms
from megatron_interbert.data.region_batch import Allocate, plain_memory
from megatron_interbert.data.training_set import Fields
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.records import read_records
from megatron_interbert.tasks.shop.catalogue import Catalogue, pair_keys
from megatron_interbert.tasks.shop.config import ProductSearchConfig

# purpose tags of `uniforms`
CANDIDATES = 8
SHARED = 9
PAIRS = 5
OWN_CHOICES = 3
SHARED_CHOICES = 32
TRIES = 8
LISTS = ("item_ids", "candidate_ids")
# of MUGE as Chinese-CLIP publishes it, and of KDD Cup 2020
OTHER_NAMES = {
    "text_id": "query_id",
    "text": "query_text",
    "query": "query_text",
    "image_ids": "item_ids",
}


@dataclass
class Queries:
    """Hold queries: ids, texts, the products that each is for (numbers in a catalogue; empty if
    unknown), and its candidate products (None: all).
    """

    path: str
    ids: list[str]
    texts: list[str]
    products: list[np.ndarray]
    candidates: list[np.ndarray | None]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labelled(self) -> bool:
        """Return whether every query names the products that it is for."""
        return all(len(products) for products in self.products)


def read_queries(path: str, catalogue: Catalogue, flag: str) -> Queries:
    """Read a JSON Lines file of query_id, query_text and, if known, item_ids (MUGE) and
    candidate_ids (KDD Cup 2020); OTHER_NAMES are read too.

    Raises UsageError that names the line if a query is empty or a product is not in the store.
    """
    found = Queries(path, [], [], [], [])

    if not path:
        raise UsageError(
            f"{flag} is missing; give a jsonl with query_id, query_text and item_ids on each line"
        )

    records = list(
        read_records(path, flag, {"query_id": (str, int), "query_text": str}, OTHER_NAMES)
    )
    listed = [_listed(record, key, where) for where, record in records for key in LISTS]
    numbers = catalogue.numbers(itertools.chain.from_iterable(listed))

    for where, record in records:
        if not record["query_text"].strip():
            raise UsageError(f"{where}: 'query_text' is empty")

        items, candidates = (
            [_number(item, numbers, where, catalogue) for item in _listed(record, key, where)]
            for key in LISTS
        )
        found.ids.append(str(record["query_id"]))
        found.texts.append(record["query_text"])
        found.products.append(np.unique(np.array(items, np.int64)))
        found.candidates.append(np.unique(np.array(candidates, np.int64)) if candidates else None)

    if not found.ids:
        raise UsageError(f"{path}: holds no queries")

    return found


def _listed(record: dict[str, Any], key: str, where: str) -> list[str]:
    """Return the items in a list of a record; empty if it has none."""
    items = record.get(key) or []
    if not isinstance(items, list):
        raise UsageError(f"{where}: '{key}' is not a list")

    return [str(item) for item in items]


def _number(item: str, numbers: dict[str, int], where: str, catalogue: Catalogue) -> int:
    if item not in numbers:
        raise UsageError(
            f"{where}: product {item} is not in {catalogue.corpus.path}, or its name means several"
            " there; give the store that holds it"
        )

    return numbers[item]


class ProductSearchSet:
    """Hold the training samples: a sample is a query and a product that belong together.

    Its batch rows are five pairs in full, and its query and choices alone.
    """

    def __init__(self, queries: Queries, catalogue: Catalogue, config: ProductSearchConfig) -> None:
        self.catalogue = catalogue
        self.config = config
        self.path = queries.path
        number = {
            text: place for place, text in enumerate(dict.fromkeys(queries.texts))
        }  # equal queries share a number
        belong = [
            pair_keys(np.full(len(p), number[text]), p, len(catalogue))
            for text, p in zip(queries.texts, queries.products, strict=True)
        ]
        self.known = np.unique(np.concatenate(belong))
        self.query_of, self.product_of = np.divmod(self.known, len(catalogue))
        self.asked = np.unique(self.query_of)
        self.names = list(number)

        if len(self.asked) < 2 or len(catalogue) < 2:
            raise UsageError(
                f"{queries.path}: training needs at least two different queries with products, and"
                " two products"
            )

        self.pieces = catalogue.tokenizer.encode_batch(self.names)
        partitions = config.fit_partitions(len(self.known))
        self.order = StepOrder([np.arange(len(self.known))], partitions, config.seed)
        by_product = np.argsort(self.product_of, kind="stable")
        self.queries_by_product = self.query_of[by_product]
        self.first_of = np.searchsorted(self.product_of[by_product], np.arange(len(catalogue) + 1))
        self.near = catalogue.corpus.has_hard_images()
        self.feature_dim = catalogue.corpus.feature_dim

    @property
    def most_rows(self) -> int:
        """Return the largest number of regions that a micro-batch can have, in pairs and
        choices.
        """
        most = min(self.config.max_regions, int(self.catalogue.corpus.region_counts.max()))
        return ((PAIRS + OWN_CHOICES) * self.config.micro_batch_size + SHARED_CHOICES) * most

    def fields(self, pairs: Sequence[tuple[int, int]], allocate: Allocate = plain_memory) -> Fields:
        """Return the fields of a PackedBatch for (step, sample) pairs [B].

        `labels` are the classes of the 5 B pairs in full, then, for each of the B queries, the
        index of its own product among the I different products alone.
        """
        steps, samples = np.array(pairs, dtype=np.int64).T
        query = self.query_of[samples]
        product = self.product_of[samples]
        draws = uniforms(self.config.seed, steps, samples, [(CANDIDATES, 0, 3 * TRIES)])[0].reshape(
            len(samples), 3, TRIES
        )
        other_query = self._unrelated(
            query, product, draws[:, 0], self.asked, lambda other: (other, product)
        )
        everything = np.arange(len(self.catalogue))
        other_product = self._unrelated(
            query, product, draws[:, 1], everything, lambda other: (query, other)
        )
        near_product, near_query = self._near(
            query, product, draws[:, 2], other_product, other_query
        )

        queries = np.stack([query, other_query, query, query, near_query], axis=1).ravel()
        products = np.stack(
            [product, product, other_product, near_product, product], axis=1
        ).ravel()
        asked, text_of = np.unique(queries, return_inverse=True)

        drawn = np.stack([product, other_product, near_product], axis=1)
        choices = np.concatenate([drawn, self._shared(steps)], axis=1)
        shown = np.unique(choices)
        own = np.searchsorted(shown, product)
        grid = np.repeat(text_of[::PAIRS], len(shown)), np.tile(shown, len(samples))
        fields = self.catalogue.both_ways(self.texts(asked), text_of, products, grid, allocate)

        return {
            **fields,
            "labels": np.concatenate([np.tile(np.array([0, 1, 1, 1, 1]), len(samples)), own]),
            "no_choice": self._no_choice(query, choices, shown, own),
            "sample_ids": np.resize(samples, len(fields["sample_ids"])),
        }

    def _shared(self, steps: np.ndarray) -> np.ndarray:
        """Draw the products that all queries of a step choose from, [B, SHARED_CHOICES]."""
        draws = uniforms(
            self.config.seed, steps, np.zeros_like(steps), [(SHARED, 0, SHARED_CHOICES)]
        )[0]
        return (draws * len(self.catalogue)).astype(int)

    def _no_choice(
        self, query: np.ndarray, choices: np.ndarray, shown: np.ndarray, own: np.ndarray
    ) -> np.ndarray:
        """Mark which of the `shown` products each query cannot choose, bool [B, I].

        These are products that are not among its `choices`, and other products that it is for;
        `own` is never marked.
        """
        marks = np.ones((len(query), len(shown)), bool)
        belong = self._belong(query[:, None], choices)
        np.put_along_axis(marks, np.searchsorted(shown, choices), belong, axis=1)
        marks[np.arange(len(query)), own] = False

        return marks

    def texts(self, queries: np.ndarray) -> list[np.ndarray]:
        """Return the token ids of some queries, cut to `max_tokens`."""
        tokens = self.pieces.take(queries, self.config.max_tokens)
        return np.split(tokens.ids.astype(np.int64), tokens.offsets[1:-1])

    def _unrelated(
        self,
        query: np.ndarray,
        product: np.ndarray,
        draws: np.ndarray,
        pool: np.ndarray,
        pair: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ) -> np.ndarray:
        """Draw from the pool, for each sample, one that makes a wrong pair, [B].

        `pair` builds the (queries, products) of the candidates. After the `draws` [B, TRIES] the
        pool is searched in order; raises UsageError if every candidate belongs together.
        """
        places = (draws * len(pool)).astype(np.int64)
        chosen = places[:, 0]

        for again in range(1, TRIES + len(pool)):
            wrong = self._belong(*pair(pool[chosen]))
            if not wrong.any():
                return pool[chosen]
            chosen = np.where(
                wrong, places[:, again] if again < TRIES else (chosen + 1) % len(pool), chosen
            )

        sample = int(np.argmax(wrong))
        raise UsageError(
            f"{self.path}: query '{self.names[query[sample]]}' is for every product, or product"
            f" {self.catalogue.ids[product[sample]]} is for every query, so there is no wrong pair"
            " to learn from; leave it out"
        )

    def _near(
        self,
        query: np.ndarray,
        product: np.ndarray,
        draws: np.ndarray,
        other_product: np.ndarray,
        other_query: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each sample, a product near its own that the query is not for, and a query
        for a near product that is not for its own, both [B]; the random ones if there is none.
        """
        products = other_product.copy()
        queries = other_query.copy()

        for row, (own_query, own) in enumerate(
            zip(query.tolist(), product.tolist(), strict=True) if self.near else ()
        ):
            near = self.catalogue.corpus.hard_images(own)
            wrong = near[~self._belong(np.full(len(near), own_query), near)]
            if len(wrong):
                products[row] = wrong[int(draws[row, 0] * len(wrong))]
            if len(near):
                neighbour = near[int(draws[row, 1] * len(near))]
                asked = self.queries_by_product[
                    self.first_of[neighbour] : self.first_of[neighbour + 1]
                ]
                asked = asked[~self._belong(asked, np.full(len(asked), own))]
                if len(asked):
                    queries[row] = asked[int(draws[row, 2] * len(asked))]

        return products, queries

    def _belong(self, queries: np.ndarray, products: np.ndarray) -> np.ndarray:
        """Check which pairs of queries and products (arrays that broadcast) are known to belong
        together.
        """
        keys = pair_keys(queries, products, len(self.catalogue))
        return (
            self.known[np.minimum(np.searchsorted(self.known, keys), len(self.known) - 1)] == keys
        )
