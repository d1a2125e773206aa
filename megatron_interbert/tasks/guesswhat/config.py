"""Declare the flags for finetuning and evaluating GuessWhat's guesser and oracle."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import FREE, ONE_TEXT, TWO_TEXTS, option, redefault, setting
from megatron_interbert.tasks.answering.config import (
    AnswerConfig,
    EvaluateAnswersConfig,
    evaluated_tokens,
    files,
    tokens,
)
from megatron_interbert.tasks.grounding.config import EvaluateRegionsConfig, RegionConfig

GAMES = "guesswhat.train.jsonl.gz, several comma-separated"


@dataclass
class GuesserConfig(RegionConfig):
    """Finetune the guesser of GuessWhat: which of the objects a dialogue is about."""

    games: str = setting("", GAMES, FREE)
    valid_games: str = setting("", "games to evaluate on; default: no evaluation", FREE)
    loss: str = redefault(RegionConfig, "loss", "softmax")
    global_batch_size: int = redefault(RegionConfig, "global_batch_size", 64)
    micro_batch_size: int = redefault(RegionConfig, "micro_batch_size", 8)
    lr: float = redefault(RegionConfig, "lr", 2e-5)
    max_regions: int = redefault(RegionConfig, "max_regions", 306)
    max_tokens: int = redefault(
        RegionConfig,
        "max_tokens",
        256,
        "tokens per dialogue, [CLS] and [SEP] included",
        room_for=ONE_TEXT,
    )


@dataclass
class EvaluateGuesserConfig(EvaluateRegionsConfig):
    """Evaluate the guesser of GuessWhat: the share of games whose object it chooses, and the
    error.
    """

    TASK: ClassVar[str] = "guesswhat_guesser"

    games: str = option("", "guesswhat.test.jsonl.gz or another, comma-separated")
    max_regions: int = redefault(EvaluateRegionsConfig, "max_regions", 0, as_trained=306)
    max_tokens: int = option(0, "tokens per dialogue", least=0, room_for=ONE_TEXT, as_trained=256)


@dataclass
class OracleConfig(AnswerConfig):
    """Finetune the oracle of GuessWhat: yes, no or not applicable, for a question about an object
    that is shown beside its scene.
    """

    games: str = files(GAMES)
    valid_games: str = files("games to evaluate on; default: no evaluation")
    lr: float = redefault(AnswerConfig, "lr", 2e-5)
    max_tokens: int = tokens(
        36, "tokens of a question with the object's kind, [CLS] and two [SEP] included", TWO_TEXTS
    )


@dataclass
class EvaluateOracleConfig(EvaluateAnswersConfig):
    """Evaluate the oracle of GuessWhat: accuracy and error of its answers."""

    TASK: ClassVar[str] = "guesswhat_oracle"

    games: str = option("", "guesswhat.test.jsonl.gz or another, comma-separated")
    max_tokens: int = evaluated_tokens(36, "tokens of a question with the object's kind", TWO_TEXTS)
