"""Declare the flags for finetuning and evaluating GQA."""

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

BALANCED = "only the balanced questions of the files"


@dataclass
class GqaConfig(AnswerConfig):
    """Finetune on GQA: one answer to each question, binary cross entropy over all answers."""

    questions: str = files("train_balanced_questions.json of GQA, several comma-separated")
    valid_questions: str = files("questions to evaluate on; default: no evaluation")
    balanced: bool = setting(False, BALANCED, SAME)
    answers: str = setting(
        "",
        "JSON of the answers to choose from (LXMERT's trainval_label2ans.json); default: all of"
        " --questions and --valid-questions",
        FREE,
    )
    lr: float = redefault(AnswerConfig, "lr", 4e-5)
    weight_decay: float = redefault(AnswerConfig, "weight_decay", 1e-4)
    max_tokens: int = tokens(26, "tokens per question, [CLS] and [SEP] included", ONE_TEXT)


@dataclass
class EvaluateGqaConfig(EvaluateAnswersConfig):
    """Evaluate GQA: accuracy by kinds of question, validity, plausibility, consistency, distance of
    the answers' distribution, and the server's file.
    """

    TASK: ClassVar[str] = "gqa"

    questions: str = option("", "testdev_balanced_questions.json or others, comma-separated")
    choices: str = option("", "val_choices.json, for validity and plausibility")
    consistency: bool = option(
        False, "also report consistency; --questions must hold all questions that others entail"
    )
    balanced: bool = option(False, BALANCED)
    max_tokens: int = evaluated_tokens(26, "tokens per question", ONE_TEXT)
    benchmark: str = benchmark("gqa")
