"""Declare the flags for finetuning and evaluating VCR."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import (
    FREE,
    SAME,
    TWO_TEXTS,
    option,
    redefault,
    setting,
)
from megatron_interbert.tasks.config import (
    EvaluateConfig,
    FinetuneConfig,
    finetuned_average,
    photos,
    store,
    training_store,
)


@dataclass
class VcrConfig(FinetuneConfig):
    """Finetune on visual commonsense reasoning: answers (Q->A) and rationales (QA->R), jointly."""

    data_path: str = training_store("", "region store of the detected regions")
    annotated_path: str = training_store(
        "",
        "region store of the annotated boxes, in the order of the annotations' objects; they come"
        " before the detected ones",
        may_differ=False,
    )
    annotations: str = setting("", "train.jsonl of VCR", FREE)
    valid_annotations: str = setting("", "val.jsonl of VCR; default: no evaluation", FREE)
    valid_data_path: str = training_store(
        "", "detected regions of the validation images, if they have their own store"
    )
    valid_annotated_path: str = training_store(
        "",
        "annotated boxes of the validation images, if they have their own store",
        may_differ=False,
    )
    epochs: float = redefault(FinetuneConfig, "epochs", 5.0)
    global_batch_size: int = redefault(
        FinetuneConfig,
        "global_batch_size",
        32,
        "questions per optimizer step over all ranks, each for both tasks",
    )
    micro_batch_size: int = redefault(
        FinetuneConfig,
        "micro_batch_size",
        4,
        "questions per rank and forward pass, 8 pairs each; auto: found by trial",
    )
    lr: float = redefault(FinetuneConfig, "lr", 2e-5)
    ema_decay: float = finetuned_average()
    max_regions: int = redefault(
        FinetuneConfig, "max_regions", 100, "regions per image, annotated ones first"
    )
    max_tokens: int = redefault(
        FinetuneConfig,
        "max_tokens",
        60,
        "tokens of a question with an answer, [CLS] and two [SEP] included",
        room_for=TWO_TEXTS,
    )
    max_rationale_tokens: int = setting(
        80,
        "tokens of question, answer and rationale, [CLS] and two [SEP] included",
        SAME,
        least=1,
        room_for=TWO_TEXTS,
        fitted=True,
    )
    eval_batch_size: int = redefault(
        FinetuneConfig, "eval_batch_size", 16, "questions per forward pass of an evaluation"
    )


@dataclass
class EvaluateVcrConfig(EvaluateConfig):
    """Evaluate VCR: accuracies (Q->A, QA->R, Q->AR), a page, and the test server's CSV."""

    TASK: ClassVar[str] = "vcr"

    data_path: str = store("", "region store of the detected regions")
    annotated_path: str = store("", "region store of the annotated boxes; these come first")
    annotations: str = option("", "val.jsonl or test.jsonl of VCR")
    max_regions: int = option(0, "regions per image, annotated ones first", least=0, as_trained=100)
    max_tokens: int = option(
        0, "tokens of a question with an answer", least=0, room_for=TWO_TEXTS, as_trained=60
    )
    max_rationale_tokens: int = option(
        0, "tokens of question, answer and rationale", least=0, room_for=TWO_TEXTS, as_trained=80
    )
    image_folder: str = photos()
    batch_size: int = option(16, "questions per forward pass", least=1, group="scoring")
    submission: bool = option(
        False,
        "write submission.csv, with the rationales given each of the four answers; every question"
        " must be usable",
        group="logging",
    )
    benchmark: str = option(
        "",
        "the data are this benchmark's: show the official metrics beside ours",
        ("", "vcr"),
        group="logging",
    )
    examples: int = option(60, "questions on the page", group="logging")
