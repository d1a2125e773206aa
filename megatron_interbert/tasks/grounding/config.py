"""Declare the flags of all tasks that point at regions."""

from dataclasses import dataclass

from megatron_interbert.config.options import SAME, option, redefault, setting
from megatron_interbert.tasks.config import (
    EvaluateConfig,
    FinetuneConfig,
    photos,
    store,
    training_store,
)
from megatron_interbert.tasks.grounding.boxes import CONVENTIONS

IOU = "how wide a box is: x2 - x1 (plain: REFER, UNITER) or one more (inclusive: VOLTA, 12-in-1)"


@dataclass
class RegionConfig(FinetuneConfig):
    """Hold the settings shared by finetuning on tasks that point at regions."""

    data_path: str = training_store("", "region store of the detected regions, or several")
    annotated_path: str = training_store(
        "", "region store of the annotated boxes; they come before the detected ones"
    )
    valid_data_path: str = training_store(
        "", "detected regions of the validation images, if they have their own store"
    )
    valid_annotated_path: str = training_store(
        "", "annotated boxes of the validation images, if they have their own store"
    )
    loss: str = setting(
        "binary",
        "binary: each region by itself, towards its IoU from 0.5 on and 0 below (12-in-1); softmax:"
        " the regions of an image compete (UNITER)",
        SAME,
        ("binary", "softmax"),
        group="optimisation",
    )
    iou: str = setting("plain", IOU, SAME, CONVENTIONS)
    global_batch_size: int = redefault(FinetuneConfig, "global_batch_size", 256)
    micro_batch_size: int = redefault(FinetuneConfig, "micro_batch_size", 32)
    max_regions: int = redefault(
        FinetuneConfig, "max_regions", 100, "regions per image, annotated ones first"
    )


@dataclass
class EvaluateRegionsConfig(EvaluateConfig):
    """Hold the settings shared by evaluations of tasks that point at regions."""

    data_path: str = store("", "region store of the detected regions, or several")
    annotated_path: str = store("", "region store of the annotated boxes")
    max_regions: int = option(0, "regions per image, annotated ones first", least=0, as_trained=100)
    iou: str = option("plain", IOU, CONVENTIONS)
    image_folder: str = photos()
    batch_size: int = option(128, "samples per forward pass", least=1, group="scoring")
    submission: bool = option(
        False, "write the chosen boxes; every sample must be usable", group="logging"
    )
    examples: int = option(60, "samples on the page", least=0, group="logging")
