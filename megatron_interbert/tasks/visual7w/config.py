"""Declare the flags for finetuning and evaluating pointing in Visual7W."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import FREE, ONE_TEXT, SAME, option, redefault, setting
from megatron_interbert.tasks.grounding.config import EvaluateRegionsConfig, RegionConfig

DATASET = "dataset.json of Visual7W pointing"


@dataclass
class Visual7wConfig(RegionConfig):
    """Finetune on pointing in Visual7W: which of four boxes answers a question."""

    dataset: str = setting("", DATASET, FREE)
    split: str = setting("train", "part of the questions to train on", SAME)
    valid_split: str = setting(
        "", "part to evaluate on (val); default: no evaluation", FREE, group="logging"
    )
    loss: str = redefault(RegionConfig, "loss", "softmax")
    lr: float = redefault(RegionConfig, "lr", 2e-5)
    max_regions: int = redefault(RegionConfig, "max_regions", 200)
    max_tokens: int = redefault(
        RegionConfig,
        "max_tokens",
        20,
        "tokens per question, [CLS] and [SEP] included",
        room_for=ONE_TEXT,
    )


@dataclass
class EvaluateVisual7wConfig(EvaluateRegionsConfig):
    """Evaluate pointing in Visual7W: the share of questions whose chosen box of four is right."""

    TASK: ClassVar[str] = "visual7w"

    dataset: str = option("", DATASET)
    split: str = option("test", "part of the questions: val or test")
    max_regions: int = redefault(EvaluateRegionsConfig, "max_regions", 0, as_trained=200)
    max_tokens: int = option(0, "tokens per question", least=0, room_for=ONE_TEXT, as_trained=20)
