"""What a finetuning run or an evaluation is told. Defaults are the recipes of the official code."""

import os
from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config import BELOW_1, Flags, TrainConfig, flag, option, split_paths
from megatron_interbert.errors import UsageError

TWO_TEXTS = "[CLS] word [SEP] word [SEP]"
PRECISIONS = ("auto", "fp32", "tf32", "bf16")  # of evaluations; what auto is: tasks/precision.py


@dataclass
class FinetuneConfig(TrainConfig):
    """Flags that all downstream tasks share."""

    model: str = option("", "preset or JSON file of model sizes; default: those of --init-from, else base")
    train_iters: int = option(0, "optimizer steps in the whole run; default: by --epochs")
    epochs: float = option(20.0, "passes over the training data", least=0)
    micro_batch_size: int = option(8, "samples per rank and forward pass; auto: by trial", auto=True)
    global_batch_size: int = option(64, "samples per optimizer step over all ranks")
    data_partitions: int = option(
        8,
        "logical partitions of the data, a multiple of the data-parallel size; default: 8, or as many"
        " as fit",
    )
    early_stopping: int = option(0, "stop after so many evaluations without a better --metric; 0: never")
    metric: str = option("", "figure of the evaluation that decides which checkpoint is best; default: the task's")
    eval_batch_size: int = option(64, "samples per forward pass of an evaluation")
    eval_precision: str = option("auto", "of evaluations; auto: TF32 where the GPU has it, else fp32", PRECISIONS)

    POSITIVE: ClassVar[tuple[str, ...]] = (*(name for name in TrainConfig.POSITIVE if name != "train_iters"), "eval_batch_size")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*TrainConfig.NOT_NEGATIVE, "train_iters", "early_stopping")

    def check(self) -> None:
        """UsageError for values that contradict each other or have no meaning."""
        super().check()
        if self.epochs <= 0:
            raise UsageError(f"--epochs is {self.epochs}, expected more than 0")


@dataclass
class RetrievalConfig(FinetuneConfig):
    """Caption-based image retrieval: four pairs for each caption, two-class loss of the matching head on each."""

    data_path: str = option("sample_corpus/train", "region store to train on, with hard_images.npy (tools/mine_neighbours.py)")
    valid_data_path: str = option("", "region store to evaluate on, all pairs of it; none: no evaluation")
    language: str = option("", "only captions of this language tag (en, zh); default: all")
    valid_images: int = option(0, "evaluate on the first images of the store only; 0: all")
    lr: float = option(4e-5, "peak learning rate", least=0)
    lr_decay_style: str = option("multistep", "shape after the warm-up", ("linear", "cosine", "constant", "multistep"))
    ema_decay: float = option(
        0.9999,
        "keep an average of the weights with this decay and evaluate it; 0: none",
        least=0,
        most=BELOW_1,
    )
    max_regions: int = option(101, "regions per image, first ones as stored")
    max_tokens: int = option(30, "tokens per caption with [CLS] and [SEP]")

    SAME_SAMPLES: ClassVar[tuple[str, ...]] = (*FinetuneConfig.SAME_SAMPLES, "language")

    def stores(self) -> list[str]:
        """The region stores of --data-path."""
        return split_paths(self.data_path)


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
class VcrConfig(FinetuneConfig):
    """Visual commonsense reasoning: answers (Q->A) and rationales (QA->R), trained together."""

    data_path: str = option("", "region store of the detected regions")
    annotated_path: str = option(
        "", "region store of the annotated boxes, in the order of the annotations' objects; they come first"
    )
    annotations: str = option("", "train.jsonl of VCR")
    valid_annotations: str = option("", "val.jsonl of VCR; none: no evaluation")
    valid_data_path: str = option("", "detected regions of the validation images, where they are in a store of their own")
    valid_annotated_path: str = option("", "annotated boxes of the validation images, where they are in a store of their own")
    epochs: float = option(5.0, "passes over the training data", least=0)
    global_batch_size: int = option(32, "questions per optimizer step over all ranks, each for both tasks")
    micro_batch_size: int = option(4, "questions per rank and forward pass, 8 pairs each; auto: by trial", auto=True)
    lr: float = option(2e-5, "peak learning rate", least=0)
    ema_decay: float = option(
        0.9999,
        "keep an average of the weights with this decay and evaluate it; 0: none",
        least=0,
        most=BELOW_1,
    )
    max_regions: int = option(100, "regions per image, annotated ones first")
    max_tokens: int = option(60, "tokens of a question with an answer, [CLS] and two [SEP] included")
    max_rationale_tokens: int = option(80, "tokens of question, answer and rationale, [CLS] and two [SEP] included")
    eval_batch_size: int = option(16, "questions per forward pass of an evaluation")

    FITTED: ClassVar[tuple[str, ...]] = (*FinetuneConfig.FITTED, "max_rationale_tokens")
    SAME_SAMPLES: ClassVar[tuple[str, ...]] = (*FinetuneConfig.SAME_SAMPLES, "max_rationale_tokens")
    POSITIVE: ClassVar[tuple[str, ...]] = (*FinetuneConfig.POSITIVE, "max_rationale_tokens")
    SHORTEST: ClassVar[str] = TWO_TEXTS


GLUE_TASKS = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI")


@dataclass
class GlueConfig(FinetuneConfig):
    """One task of GLUE on the text path: interaction layers and text stream, as in BERT."""

    task: str = option("SST-2", "task of GLUE", GLUE_TASKS)
    data_path: str = option("", "folder with the task's official TSV files (train.tsv, dev.tsv, test.tsv), or the one above it")
    epochs: float = option(3.0, "passes over the training data", least=0)
    global_batch_size: int = option(32, "samples per optimizer step over all ranks")
    micro_batch_size: int = option(32, "samples per rank and forward pass; auto: by trial", auto=True)
    lr: float = option(2e-5, "peak learning rate", least=0)
    max_tokens: int = option(128, "tokens with [CLS] and [SEP]")

    SAME_SAMPLES: ClassVar[tuple[str, ...]] = (*FinetuneConfig.SAME_SAMPLES, "task")
    SHORTEST: ClassVar[str] = TWO_TEXTS


@dataclass
class EvaluateConfig(Flags):
    """Flags that all evaluations share."""

    load: str = option(
        "", "a run's folder (its best, else its newest checkpoint), one global_stepN, a Hugging Face folder or a .bin"
    )
    averaged: bool = option(True, "take the averaged weights (--ema-decay) of a checkpoint that has such")
    vocab_file: str = option("", "WordPiece vocabulary; default: that of the data or of the weights")
    output: str = option("", "folder for result.json and result.html; default: evaluation/TASK in the run's folder")
    tensor_model_parallel_size: int = option(1, "ranks that share each layer, under deepspeed or torchrun")
    precision: str = option("auto", "auto: TF32 where the GPU has it, else fp32; bf16: heads in fp32", PRECISIONS)
    kernels: str = option("auto", "fused kernels", ("auto", "torch", "triton", "apex"))
    allow_other_detector: bool = option(False, "accept features of another detector than the model was trained on")
    strict_boxes: bool = option(False, "refuse boxes outside the image instead of clipping them")
    hang_timeout: int = option(300, "end when no rank moves for four times so many seconds; 0: never")
    TASK: ClassVar[str] = ""
    POSITIVE: ClassVar[tuple[str, ...]] = ("tensor_model_parallel_size",)
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("hang_timeout",)


@dataclass
class EvaluateRetrievalConfig(EvaluateConfig):
    """All pairs of a store's images and captions by the matching head, both directions."""

    data_path: str = option("sample_corpus/test", "region store to evaluate on")
    zero_shot: bool = option(False, "label the result as zero-shot: the pretrained matching head, no finetuning")
    benchmark: str = option("", "the data are this benchmark's: show the paper's figures beside", ("", "flickr30k"))
    language: str = option("", "only captions of this language tag; default: all")
    max_images: int = option(0, "only the first images of the store; 0: all")
    max_regions: int = option(0, "regions per image; default: as the weights were trained, else 36")
    max_tokens: int = option(0, "tokens per caption with [CLS] and [SEP]; default: as the weights were trained, else 36")
    bf16: bool = option(False, "as --precision bf16; --no-bf16 as --precision fp32")
    batch_pairs: int = option(512, "pairs per forward pass")
    tile_captions: int = option(1024, "captions of a tile, the unit of work that is kept when an evaluation is stopped")
    tile_images: int = option(256, "images of a tile")
    two_stage: int = option(0, "also rank by pooled vectors and score only so many images of each caption again; 0: no")
    exhaustive: bool = option(True, "score all pairs; --no-exhaustive leaves that out where only --two-stage can be paid for")
    image_folder: str = option("", "photos named IMAGE_ID.jpg to show on the page")
    TASK: ClassVar[str] = "retrieval"
    POSITIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.POSITIVE, "batch_pairs", "tile_captions", "tile_images")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.NOT_NEGATIVE, "max_images", "max_regions", "max_tokens", "two_stage")

    def check(self) -> None:
        """UsageError for values that contradict each other or have no meaning."""
        super().check()
        if not self.exhaustive and not self.two_stage:
            raise UsageError("--no-exhaustive leaves nothing to do without --two-stage K")
        if self.bf16 and self.precision not in ("auto", "bf16"):
            raise UsageError(f"--bf16 and --precision {self.precision} exclude each other; leave one out")
        if self.bf16:
            self.precision = "bf16"
        elif "bf16" in self.given and self.precision == "auto":
            self.precision = "fp32"


@dataclass
class EvaluateGlueConfig(EvaluateConfig):
    """One task of GLUE: official metrics on its dev files, or prediction files for its test files."""

    task: str = option("SST-2", "task of GLUE", GLUE_TASKS)
    data_path: str = option("", "folder with the task's official TSV files, or the one above it")
    split: str = option("dev", "files to predict", ("dev", "test"))
    max_tokens: int = option(0, "tokens with [CLS] and [SEP]; default: as the weights were trained, else 128")
    batch_size: int = option(64, "samples per forward pass")
    TASK: ClassVar[str] = "glue"
    POSITIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.POSITIVE, "batch_size")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.NOT_NEGATIVE, "max_tokens")
    SHORTEST: ClassVar[str] = TWO_TEXTS


@dataclass
class EvaluateVcrConfig(EvaluateConfig):
    """VCR: Q->A, QA->R and Q->AR, or the test server's CSV, and a page with each question."""

    data_path: str = option("", "region store of the detected regions")
    annotated_path: str = option("", "region store of the annotated boxes; they come first")
    annotations: str = option("", "val.jsonl or test.jsonl of VCR")
    submission: bool = option(
        False, "write submission.csv with all 16 pairs of answer and rationale; every question must be usable"
    )
    benchmark: str = option("", "the data are this benchmark's: show the official figures beside", ("", "vcr"))
    max_regions: int = option(0, "regions per image, annotated ones first; default: as the weights were trained, else 100")
    max_tokens: int = option(0, "tokens of a question with an answer; default: as the weights were trained, else 60")
    max_rationale_tokens: int = option(0, "tokens of question, answer and rationale; default: as the weights were trained, else 80")
    batch_size: int = option(16, "questions per forward pass")
    examples: int = option(60, "questions on the page")
    image_folder: str = option("", "photos named IMAGE_ID.jpg to show on the page")
    TASK: ClassVar[str] = "vcr"
    POSITIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.POSITIVE, "batch_size")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (
        *EvaluateConfig.NOT_NEGATIVE,
        *("max_regions", "max_tokens", "max_rationale_tokens"),
    )
    SHORTEST: ClassVar[str] = TWO_TEXTS


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


@dataclass
class ServeConfig(Flags):
    """Product search and topic-based recommendation over HTTP: a model, an index of items, a page. The API key comes from the environment
    (INTERBERT_API_KEY): a command line can be read by others."""

    load: str = option(
        "", "a run's folder (its best, else its newest checkpoint), one global_stepN, a Hugging Face folder or a .bin"
    )
    averaged: bool = option(True, "take the averaged weights (--ema-decay) of a checkpoint that has such")
    vocab_file: str = option("", "WordPiece vocabulary; default: that of the data or of the weights")
    data_path: str = option("sample_shop/test", "region stores with the items' pictures; several: A,B,C")
    topics: str = option("", "jsonl of topic_id, name, description, keywords that can be asked for by their ids")
    items: str = option(
        "", "jsonl of item_id, image_id (default: item_id), title and attributes to begin with; default: all images"
    )
    load_recommendation: str = option("", "weights that answer topics, finetuned from clicks; default: those of --load do")
    index: str = option("", "folder of the index; default: `index` in the run's folder")
    recommendation_index: str = option("", "folder of the index for topics; default: `index` in the folder of that run")
    index_kind: str = option(
        "exact", "exact compares with all vectors, hnsw walks a graph: for millions of items", ("exact", "hnsw")
    )
    rebuild: bool = option(False, "make a new version of the index, even if there is one")
    build_only: bool = option(False, "make a new version of the index and end; a running service takes it over")
    titles: bool = option(True, "read the items' titles; --no-titles sees their images only; default: as the weights were trained")
    max_regions: int = option(0, "regions per image; default: as the weights were trained, else 36")
    max_tokens: int = option(0, "tokens of a text and a title; default: as the weights were trained, else 64")
    precision: str = option("auto", "auto: TF32 where the GPU has it, else fp32; bf16: heads in fp32", PRECISIONS)
    kernels: str = option("auto", "fused kernels", ("auto", "torch", "triton", "apex"))
    allow_other_detector: bool = option(False, "accept features of another detector than the model was trained on")
    strict_boxes: bool = option(False, "refuse boxes outside the image instead of clipping them")
    image_folder: str = option("", "photos named IMAGE_ID.jpg; default: drawings of the regions")
    host: str = option("127.0.0.1", "address to listen at; put it behind a proxy before others reach it")
    port: int = option(8080, "port to listen at; 0: any free one")
    allowed_hosts: str = option("", "names that Host headers may have besides this machine's own: A,*.B; *: any")
    protect_reads: bool = option(False, "searches need the API key too")
    max_connections: int = option(1000, "connections open at once; beyond, those that wait longest for their clients are ended")
    header_timeout: float = option(10.0, "seconds within which the headers of a request must come")
    keep_alive_timeout: float = option(5.0, "seconds that a connection is kept for another request")
    queue_size: int = option(256, "questions that may wait; what comes beyond is answered 429")
    pairs_at_once: int = option(2048, "pairs of texts and items that are scored together")
    deadline: float = option(5.0, "seconds that a question may wait; then it is answered 503")
    max_body: int = option(65536, "bytes of a request's body")
    body_seconds: float = option(10.0, "seconds within which a body must come")
    drain_seconds: int = option(30, "seconds for what is under way when the service is told to end")

    POSITIVE: ClassVar[tuple[str, ...]] = ("queue_size", "pairs_at_once", "max_body", "max_connections")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("max_regions", "max_tokens", "port", "drain_seconds")
    SHORTEST: ClassVar[str] = TWO_TEXTS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.api_key = os.environ.get("INTERBERT_API_KEY", "")

    def check(self) -> None:
        """UsageError for values that contradict each other or have no meaning."""
        super().check()
        for name in ("deadline", "body_seconds", "header_timeout", "keep_alive_timeout"):
            if not getattr(self, name) > 0:  # nor NaN
                raise UsageError(f"{flag(name)} is {getattr(self, name)}, expected more than 0")
        if self.recommendation_index and not self.load_recommendation:
            raise UsageError("--recommendation-index needs --load-recommendation: without it topics are answered by --load")
        if self.port > 65535:
            raise UsageError(f"--port is {self.port}, expected 65535 or less")
        if not self.api_key.isascii() or not self.api_key.isprintable() or self.api_key != self.api_key.strip():
            raise UsageError("INTERBERT_API_KEY: a header cannot carry it; take printable ASCII characters, no space at its ends")
        if self.protect_reads and not self.api_key:
            raise UsageError("--protect-reads needs a key: export INTERBERT_API_KEY=.. before the service is started")
