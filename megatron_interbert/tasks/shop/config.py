"""Declare the flags for finetuning and evaluating product search and topic recommendation."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import (
    FREE,
    SAME,
    TWO_TEXTS,
    Flags,
    option,
    redefault,
    setting,
)
from megatron_interbert.config.stores import split_paths
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.config import (
    EvaluateConfig,
    FinetuneConfig,
    photos,
    store,
    training_store,
)

TITLES = "read the items' titles; --no-titles: only their images"


@dataclass
class ItemConfig(FinetuneConfig):
    """Hold the settings shared by finetuning tasks over items (an image and a title)."""

    data_path: str = training_store(
        "sample_shop/train",
        "region store of the items; the first caption of an image is its title",
    )
    valid_data_path: str = training_store(
        "", "region store of the items to evaluate on; default: --data-path"
    )
    titles: bool = setting(True, TITLES, SAME)
    epochs: float = redefault(FinetuneConfig, "epochs", 5.0)
    micro_batch_size: int = redefault(FinetuneConfig, "micro_batch_size", 16)
    lr: float = redefault(FinetuneConfig, "lr", 4e-5)
    max_tokens: int = redefault(
        FinetuneConfig,
        "max_tokens",
        64,
        "tokens of a text with a title, [CLS] and two [SEP] included",
        room_for=TWO_TEXTS,
    )

    def stores(self) -> list[str]:
        """List the region stores of --data-path."""
        return split_paths(self.data_path)


@dataclass
class ProductSearchConfig(ItemConfig):
    """Finetune on product search: queries to products, matched in one sequence and by vectors."""

    queries: str = setting("", "jsonl of query_id, query_text, item_ids to train on", FREE)
    valid_queries: str = setting(
        "", "jsonl of queries to evaluate on; default: no evaluation", FREE
    )


@dataclass
class RecommendationConfig(ItemConfig):
    """Finetune on topic-based recommendation: topics to items, from clicks."""

    topics: str = setting("", "jsonl of topic_id, name, description, keywords to train on", FREE)
    clicks: str = setting("", "jsonl of topic_id, item_id, clicked (0 or 1) to train on", FREE)
    valid_topics: str = setting("", "topics to evaluate on; default: those of --topics", FREE)
    valid_clicks: str = setting("", "jsonl of clicks to evaluate on; default: no evaluation", FREE)


@dataclass
class ItemReading(Flags):
    """Hold the settings for reading items and texts; default: as the weights were trained."""

    GROUP: ClassVar[str] = "data"

    titles: bool = option(True, TITLES, as_trained=True)
    max_regions: int = option(0, "regions per image", least=0, as_trained=36)
    max_tokens: int = option(
        0, "tokens of a text with a title", least=0, room_for=TWO_TEXTS, as_trained=64
    )


@dataclass
class EvaluateProductSearchConfig(ItemReading, EvaluateConfig):
    """Search the products of each query, in full or in two stages; metrics and submission files."""

    TASK: ClassVar[str] = "product_search"

    data_path: str = store("sample_shop/test", "region store of the products")
    queries: str = option(
        "",
        "jsonl of query_id, query_text and, for metrics, item_ids; candidate_ids limit the choice",
    )
    image_folder: str = photos("photos named IMAGE_ID.jpg or .png to show on the page")
    two_stage: int = option(
        0,
        "also search in two stages: this many products by vectors, then those in full; 0: no",
        least=0,
        group="scoring",
        old_names=("--first-stage",),
    )
    exhaustive: bool = option(
        True,
        "score all products in full; --no-exhaustive: only --two-stage",
        group="scoring",
    )
    submission: str = option(
        "",
        "also write the submission file of this benchmark",
        ("", "muge", "kddcup2020"),
        group="logging",
    )

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()
        if not self.exhaustive and not self.two_stage:
            raise UsageError("--no-exhaustive leaves nothing to do without --two-stage K")


@dataclass
class EvaluateRecommendationConfig(ItemReading, EvaluateConfig):
    """Score the items that users were shown under topics, with metrics of what they clicked."""

    TASK: ClassVar[str] = "recommendation"

    data_path: str = store("sample_shop/test", "region store of the items")
    topics: str = option("", "jsonl of topic_id, name, description, keywords")
    clicks: str = option("", "jsonl of topic_id, item_id, clicked (0 or 1) to measure by")


@dataclass
class ScoreTopicsConfig(ItemReading, EvaluateConfig):
    """Score all items for all topics, and write the scores as Parquet."""

    TASK: ClassVar[str] = "topic_scores"

    data_path: str = store("sample_shop/test", "region store of the items")
    topics: str = option("", "jsonl of topic_id, name, description, keywords")
    items_of_part: int = option(
        1024,
        "items per part, the unit of work that survives when the scoring is stopped",
        least=1,
        group="scoring",
    )
