"""Declare the flags for finetuning and evaluating on the questions of Visual Genome."""

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

HELD_OUT = "the last N images by id"


@dataclass
class VgqaConfig(AnswerConfig):
    """Finetune on the questions of Visual Genome, for its own sake or before others."""

    questions: str = files("question_answers.json of Visual Genome, several comma-separated")
    valid_questions: str = files("questions to evaluate on; default: no evaluation")
    minval: int = setting(
        0, f"train without {HELD_OUT}, and evaluate on those (VOLTA: 5000)", SAME, least=0
    )
    answers: str = setting(
        "",
        "JSON of the answers to choose from, such as VQA's; default: the frequent ones",
        FREE,
    )
    min_occurrences: int = setting(
        9, "without --answers: keep answers given to at least this many questions", SAME, least=1
    )
    global_batch_size: int = redefault(AnswerConfig, "global_batch_size", 128)
    lr: float = redefault(AnswerConfig, "lr", 4e-5)
    max_tokens: int = tokens(26, "tokens per question, [CLS] and [SEP] included", ONE_TEXT)


@dataclass
class EvaluateVgqaConfig(EvaluateAnswersConfig):
    """Evaluate questions of Visual Genome: the share answered as the file does."""

    TASK: ClassVar[str] = "vgqa"

    questions: str = option("", "question_answers.json of Visual Genome, several comma-separated")
    minval: int = option(0, f"only {HELD_OUT}; 0: all", least=0)
    max_tokens: int = evaluated_tokens(26, "tokens per question", ONE_TEXT)
