"""What finetuning and evaluating VCR are told."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config import BELOW_1, option
from megatron_interbert.tasks.config import TWO_TEXTS, EvaluateConfig, FinetuneConfig


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
