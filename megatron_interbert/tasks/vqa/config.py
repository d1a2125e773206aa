"""Declare the flags for finetuning and evaluating VQA."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import FREE, ONE_TEXT, SAME, option, redefault, setting
from megatron_interbert.tasks.answering.config import (
    AnswerConfig,
    EvaluateAnswersConfig,
    evaluated_tokens,
    files,
    tokens,
)
from megatron_interbert.tasks.config import benchmark


@dataclass
class VqaConfig(AnswerConfig):
    """Finetune on visual question answering (VQA v2): answers with scores, binary cross entropy."""

    questions: str = files("v2_OpenEnded_.._questions.json of VQA, several comma-separated")
    annotations: str = files("v2_.._annotations.json with the answers to --questions")
    valid_questions: str = files("questions to evaluate on; default: no evaluation")
    valid_annotations: str = files("the answers to --valid-questions")
    minval: int = setting(
        0,
        "train on --valid-questions too, except the last N by id, and evaluate on those (the"
        " field's minval: 3000)",
        SAME,
        least=0,
    )
    answers: str = setting(
        "",
        "JSON of the answers to choose from (label2ans, ans2label); default: the frequent ones of"
        " all annotations",
        FREE,
    )
    min_occurrences: int = setting(
        9,
        "without --answers: keep answers that are the main one of at least this many questions",
        SAME,
        least=1,
    )
    lr: float = redefault(AnswerConfig, "lr", 1e-4)
    weight_decay: float = redefault(AnswerConfig, "weight_decay", 1e-4)
    max_tokens: int = tokens(23, "tokens per question, [CLS] and [SEP] included", ONE_TEXT)


@dataclass
class EvaluateVqaConfig(EvaluateAnswersConfig):
    """Evaluate VQA: the official accuracy, by type of question and answer, and its server's
    file.
    """

    TASK: ClassVar[str] = "vqa"

    questions: str = option("", "v2_OpenEnded_.._questions.json of VQA, several comma-separated")
    annotations: str = option("", "v2_.._annotations.json, if the answers are known")
    max_tokens: int = evaluated_tokens(23, "tokens per question", ONE_TEXT)
    benchmark: str = benchmark("vqa-v2")
