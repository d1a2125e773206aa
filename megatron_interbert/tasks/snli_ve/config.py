"""Declare the flags for finetuning and evaluating SNLI-VE."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import ONE_TEXT, option, redefault
from megatron_interbert.tasks.answering.config import (
    AnswerConfig,
    EvaluateAnswersConfig,
    evaluated_tokens,
    files,
    tokens,
)
from megatron_interbert.tasks.config import benchmark


@dataclass
class SnliVeConfig(AnswerConfig):
    """Finetune on visual entailment (SNLI-VE): three classes, cross entropy."""

    annotations: str = files("snli_ve_train.jsonl, several comma-separated")
    valid_annotations: str = files("snli_ve_dev.jsonl to evaluate on; default: no evaluation")
    global_batch_size: int = redefault(AnswerConfig, "global_batch_size", 128)
    lr: float = redefault(AnswerConfig, "lr", 2e-5)
    weight_decay: float = redefault(AnswerConfig, "weight_decay", 1e-4)
    max_tokens: int = tokens(56, "tokens per statement, [CLS] and [SEP] included", ONE_TEXT)


@dataclass
class EvaluateSnliVeConfig(EvaluateAnswersConfig):
    """Evaluate visual entailment (SNLI-VE): accuracy, also of each class."""

    TASK: ClassVar[str] = "snli_ve"

    annotations: str = option("", "snli_ve_dev.jsonl or snli_ve_test.jsonl, comma-separated")
    max_tokens: int = evaluated_tokens(56, "tokens per statement", ONE_TEXT)
    benchmark: str = benchmark("snli-ve")
