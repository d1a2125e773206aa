"""Read topics and clicks, and make the training samples of topic-based recommendation.

A sample is one showing of an item under a topic. The pair is scored in full and alone; its class is
0 if the item was clicked, else 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_interbert.data.order import SampleOrder
from megatron_interbert.data.region_batch import Allocate, plain_memory
from megatron_interbert.data.training_set import Fields
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.records import read_records
from megatron_interbert.tasks.shop.catalogue import Catalogue
from megatron_interbert.tasks.shop.config import RecommendationConfig


@dataclass
class Topics:
    """Hold topics: ids, names, and the texts that the model reads (name, description, keywords)."""

    ids: list[str]
    names: list[str]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Clicks:
    """Hold showings [n]: the numbers of topic and item, and whether the item was clicked (1 or
    0).
    """

    topics: np.ndarray
    items: np.ndarray
    clicked: np.ndarray


def topic_text(name: str, description: str = "", keywords: Sequence[str] = ()) -> str:
    """Return the text that the model reads of a topic: its parts, joined by spaces."""
    return " ".join(part for part in (name, description, " ".join(keywords)) if part)


def read_topics(path: str, flag: str) -> Topics:
    """Read a JSON Lines file of topic_id, name and, optionally, description and keywords.

    Raises UsageError that names the line if a topic has no text or values of another type, and
    UsageError if there are no topics or an id occurs twice.
    """
    if not path:
        raise UsageError(
            f"{flag} is missing; give a jsonl with topic_id, name, description and keywords on each"
            " line"
        )

    found = Topics([], [], [])
    for where, record in read_records(path, flag, {"topic_id": (str, int), "name": str}):
        description = record.get("description") or ""
        keywords = record.get("keywords") or []
        if (
            not isinstance(description, str)
            or not isinstance(keywords, list)
            or not all(isinstance(k, str) for k in keywords)
        ):
            raise UsageError(
                f"{where}: expected a string as description and a list of strings as keywords"
            )

        text = topic_text(record["name"], description, keywords)
        if not text.strip():
            raise UsageError(f"{where}: the topic has no text; give it a name")

        found.ids.append(str(record["topic_id"]))
        found.names.append(record["name"])
        found.texts.append(text)

    if not found.ids:
        raise UsageError(f"{path}: holds no topics")
    if len(set(found.ids)) < len(found.ids):
        twice = next(key for key in found.ids if found.ids.count(key) > 1)
        raise UsageError(f"{path}: topic_id {twice} occurs twice; each topic needs its own")

    return found


def read_clicks(path: str, topics: Topics, catalogue: Catalogue, flag: str) -> Clicks:
    """Read a JSON Lines file of topic_id, item_id and clicked (0 or 1).

    Raises UsageError that names the line if a topic or item is unknown or clicked is another
    number, and UsageError if there are no clicks.
    """
    if not path:
        raise UsageError(
            f"{flag} is missing; give a jsonl with topic_id, item_id and clicked on each line"
        )

    numbers = {key: number for number, key in enumerate(topics.ids)}
    rows = []
    records = list(
        read_records(path, flag, {"topic_id": (str, int), "item_id": (str, int), "clicked": int})
    )
    items = catalogue.numbers(str(record["item_id"]) for _, record in records)

    for where, record in records:
        topic = numbers.get(str(record["topic_id"]))
        item = items.get(str(record["item_id"]))

        if topic is None:
            raise UsageError(
                f"{where}: topic {record['topic_id']} is not among those of --topics; give the file"
                " that holds it"
            )

        if item is None:
            raise UsageError(
                f"{where}: item {record['item_id']} is not in {catalogue.corpus.path}; give the"
                " store that holds it"
            )

        if record["clicked"] not in (0, 1):
            raise UsageError(f"{where}: 'clicked' is {record['clicked']}, expected 0 or 1")

        rows.append((topic, item, record["clicked"]))

    if not rows:
        raise UsageError(f"{path}: holds no clicks")

    return Clicks(*np.array(rows, np.int64).T)


class ClickSet:
    """Hold the training samples: a sample is a showing, scored in full and alone."""

    def __init__(
        self, topics: Topics, clicks: Clicks, catalogue: Catalogue, config: RecommendationConfig
    ) -> None:
        self.clicks = clicks
        self.catalogue = catalogue
        self.config = config
        self.pieces = catalogue.tokenizer.encode_batch(topics.texts)
        partitions = config.fit_partitions(len(clicks.topics))
        self.order = SampleOrder([np.arange(len(clicks.topics))], partitions, config.seed)
        self.feature_dim = catalogue.corpus.feature_dim

    @property
    def most_rows(self) -> int:
        """Return the largest number of regions that a micro-batch can have."""
        return (
            2
            * self.config.micro_batch_size
            * min(self.config.max_regions, int(self.catalogue.corpus.region_counts.max()))
        )

    def fields(self, pairs: Sequence[tuple[int, int]], allocate: Allocate = plain_memory) -> Fields:
        """Return the fields of a PackedBatch for (epoch, showing) pairs [B].

        `labels` [2 B] are the classes of the pairs in full, then of the same pairs alone.
        """
        samples = np.array([sample for _, sample in pairs], np.int64)
        shown, topic_of = np.unique(self.clicks.topics[samples], return_inverse=True)
        tokens = self.pieces.take(shown, self.config.max_tokens)
        texts = np.split(tokens.ids.astype(np.int64), tokens.offsets[1:-1])
        items = self.clicks.items[samples]
        fields = self.catalogue.both_ways(texts, topic_of, items, (topic_of, items), allocate)
        labels = np.tile(1 - self.clicks.clicked[samples], 2)

        return {
            **fields,
            "labels": labels,
            "sample_ids": np.resize(samples, len(fields["sample_ids"])),
        }
