"""Declare the flags for finetuning and evaluating NLVR2."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import ONE_TEXT, SAME, option, redefault, setting
from megatron_interbert.tasks.answering.config import (
    AnswerConfig,
    EvaluateAnswersConfig,
    evaluated_tokens,
    files,
    tokens,
)
from megatron_interbert.tasks.config import benchmark


@dataclass
class Nlvr2Config(AnswerConfig):
    """Finetune on NLVR2: whether a statement is true of two images, cross entropy."""

    annotations: str = files("train.json of NLVR2 (JSON lines), several comma-separated")
    valid_annotations: str = files("dev.json to evaluate on; default: no evaluation")
    triplet: bool = setting(
        False,
        "read the statement with both images, side by side, at once, instead of with each and"
        " joining the two results",
        SAME,
    )
    global_batch_size: int = redefault(AnswerConfig, "global_batch_size", 64)
    micro_batch_size: int = redefault(AnswerConfig, "micro_batch_size", 16)
    lr: float = redefault(AnswerConfig, "lr", 1e-5)
    weight_decay: float = redefault(AnswerConfig, "weight_decay", 1e-4)
    max_tokens: int = tokens(40, "tokens per statement, [CLS] and [SEP] included", ONE_TEXT)


@dataclass
class EvaluateNlvr2Config(EvaluateAnswersConfig):
    """Evaluate NLVR2: accuracy, consistency over the pairs of each statement, the server's file."""

    TASK: ClassVar[str] = "nlvr2"

    annotations: str = option("", "dev.json, test1.json or others of NLVR2, comma-separated")
    max_tokens: int = evaluated_tokens(40, "tokens per statement", ONE_TEXT)
    benchmark: str = benchmark("nlvr2")
