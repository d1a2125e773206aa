"""Declare the flags for finetuning and evaluating referring expressions."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import FREE, ONE_TEXT, SAME, option, redefault, setting
from megatron_interbert.tasks.config import benchmark
from megatron_interbert.tasks.grounding.config import EvaluateRegionsConfig, RegionConfig

REFS = "refs(unc).p or refs(umd).p of RefCOCO, RefCOCO+ or RefCOCOg, or the same as JSON"
INSTANCES = "instances.json beside it"


@dataclass
class RefcocoConfig(RegionConfig):
    """Finetune on referring expressions (RefCOCO, RefCOCO+, RefCOCOg): a score for each region."""

    refs: str = setting("", REFS, FREE)
    instances: str = setting("", INSTANCES, FREE)
    split: str = setting("train", "part of the expressions to train on", SAME)
    valid_split: str = setting(
        "", "part to evaluate on (val); default: no evaluation", FREE, group="logging"
    )
    lr: float = redefault(RegionConfig, "lr", 2e-5)
    weight_decay: float = redefault(RegionConfig, "weight_decay", 1e-4)
    max_tokens: int = redefault(
        RegionConfig,
        "max_tokens",
        20,
        "tokens per expression, [CLS] and [SEP] included",
        room_for=ONE_TEXT,
    )


@dataclass
class EvaluateRefcocoConfig(EvaluateRegionsConfig):
    """Evaluate referring expressions: the share of chosen boxes with an IoU above 0.5, among
    annotated boxes (gt) and among detected ones (det).
    """

    TASK: ClassVar[str] = "refcoco"

    refs: str = option("", REFS)
    instances: str = option("", INSTANCES)
    split: str = option("val", "part of the expressions: val, testA, testB or test")
    max_tokens: int = option(0, "tokens per expression", least=0, room_for=ONE_TEXT, as_trained=20)
    benchmark: str = benchmark("refcoco+", "refcocog")
