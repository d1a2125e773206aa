"""What finetuning and evaluating product search and topic-based recommendation are told."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config import option, split_paths
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.config import TWO_TEXTS, EvaluateConfig, FinetuneConfig


@dataclass
class ItemConfig(FinetuneConfig):
    """What tasks over items (an image and a title) share."""

    data_path: str = option("sample_shop/train", "region store of the items; the first caption of an image is its title")
    valid_data_path: str = option("", "region store of the items to evaluate on; default: those of --data-path")
    titles: bool = option(True, "read the items' titles; --no-titles sees their images only")
    epochs: float = option(5.0, "passes over the training data", least=0)
    micro_batch_size: int = option(16, "samples per rank and forward pass; auto: by trial", auto=True)
    lr: float = option(4e-5, "peak learning rate", least=0)
    max_tokens: int = option(64, "tokens of a text and a title, [CLS] and two [SEP] included")

    SAME_SAMPLES: ClassVar[tuple[str, ...]] = (*FinetuneConfig.SAME_SAMPLES, "titles")
    SHORTEST: ClassVar[str] = TWO_TEXTS

    def stores(self) -> list[str]:
        """The region stores of --data-path."""
        return split_paths(self.data_path)


@dataclass
class ProductSearchConfig(ItemConfig):
    """Text-based image retrieval: queries to products, judged in one sequence and by vectors."""

    queries: str = option("", "jsonl of query_id, query_text, item_ids to train on")
    valid_queries: str = option("", "jsonl of queries to evaluate on; none: no evaluation")


@dataclass
class RecommendationConfig(ItemConfig):
    """Topic-based recommendation: topics to items, from clicks."""

    topics: str = option("", "jsonl of topic_id, name, description, keywords to train on")
    clicks: str = option("", "jsonl of topic_id, item_id, clicked (0 or 1) to train on")
    valid_topics: str = option("", "topics to evaluate on; default: those of --topics")
    valid_clicks: str = option("", "jsonl of clicks to evaluate on; none: no evaluation")


@dataclass
class EvaluateProductSearchConfig(EvaluateConfig):
    """Products for each query: all candidates in full, and in two stages; figures, and files for the benchmarks' servers."""

    data_path: str = option("sample_shop/test", "region store of the products")
    queries: str = option("", "jsonl of query_id, query_text and, to measure, item_ids; candidate_ids limit the choice")
    titles: bool = option(
        True, "read the products' titles; --no-titles sees their images only; default: as the weights were trained"
    )
    first_stage: int = option(0, "also search in two stages: so many products by vectors, then these in full; 0: no")
    exhaustive: bool = option(True, "score all products in full; --no-exhaustive leaves only --first-stage")
    submission: str = option("", "write the file that a benchmark's server takes", ("", "muge", "kddcup2020"))
    image_folder: str = option("", "photos named IMAGE_ID.jpg or .png to show on the page")
    max_regions: int = option(0, "regions per image; default: as the weights were trained, else 36")
    max_tokens: int = option(0, "tokens of a query and a title; default: as the weights were trained, else 64")
    TASK: ClassVar[str] = "product_search"
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.NOT_NEGATIVE, "max_regions", "max_tokens", "first_stage")
    SHORTEST: ClassVar[str] = TWO_TEXTS

    def check(self) -> None:
        """UsageError for values that contradict each other or have no meaning."""
        super().check()
        if not self.exhaustive and not self.first_stage:
            raise UsageError("--no-exhaustive leaves nothing to do without --first-stage K")


@dataclass
class EvaluateRecommendationConfig(EvaluateConfig):
    """Scores of topics and items that users were shown, and figures of what they clicked."""

    data_path: str = option("sample_shop/test", "region store of the items")
    topics: str = option("", "jsonl of topic_id, name, description, keywords")
    clicks: str = option("", "jsonl of topic_id, item_id, clicked, to measure by")
    titles: bool = option(True, "read the items' titles; --no-titles sees their images only; default: as the weights were trained")
    max_regions: int = option(0, "regions per image; default: as the weights were trained, else 36")
    max_tokens: int = option(0, "tokens of a topic and a title; default: as the weights were trained, else 64")
    TASK: ClassVar[str] = "recommendation"
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.NOT_NEGATIVE, "max_regions", "max_tokens")
    SHORTEST: ClassVar[str] = TWO_TEXTS


@dataclass
class ScoreTopicsConfig(EvaluateConfig):
    """Scores of all topics and items, as Parquet."""

    data_path: str = option("sample_shop/test", "region store of the items")
    topics: str = option("", "jsonl of topic_id, name, description, keywords")
    titles: bool = option(True, "read the items' titles; --no-titles sees their images only; default: as the weights were trained")
    max_regions: int = option(0, "regions per image; default: as the weights were trained, else 36")
    max_tokens: int = option(0, "tokens of a topic and a title; default: as the weights were trained, else 64")
    items_of_part: int = option(1024, "items of a part, the unit of work that is kept when the scoring is stopped")
    TASK: ClassVar[str] = "topic_scores"
    POSITIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.POSITIVE, "items_of_part")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.NOT_NEGATIVE, "max_regions", "max_tokens")
    SHORTEST: ClassVar[str] = TWO_TEXTS
