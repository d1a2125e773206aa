"""What every finetuning run and every evaluation is told; each task adds its own in its folder."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_interbert.config.options import (
    ABOVE_0,
    BELOW_1,
    FREE,
    Flags,
    option,
    redefault,
    setting,
)
from megatron_interbert.config.training import TrainConfig

PRECISIONS = ("auto", "fp32", "tf32", "bf16")  # of evaluations; what auto is: tasks/precision.py


@dataclass
class FinetuneConfig(TrainConfig):
    """What all downstream tasks are told."""

    GROUP: ClassVar[str] = "data"

    model: str = redefault(
        TrainConfig,
        "model",
        "",
        "preset or JSON file of model sizes; default: those of --init-from, else base",
    )
    train_iters: int = redefault(
        TrainConfig,
        "train_iters",
        0,
        "optimizer steps in the whole run; default: by --epochs",
        least=0,
    )
    epochs: float = setting(
        20.0, "passes over the training data", FREE, least=ABOVE_0, group="optimisation"
    )
    micro_batch_size: int = redefault(TrainConfig, "micro_batch_size", 8)
    global_batch_size: int = redefault(
        TrainConfig, "global_batch_size", 64, "samples per optimizer step over all ranks"
    )
    data_partitions: int = redefault(
        TrainConfig,
        "data_partitions",
        8,
        "logical partitions of the data, a multiple of the data-parallel size; default: 8, or as"
        " many as fit",
    )
    early_stopping: int = setting(
        0,
        "stop after so many evaluations without a better --metric; 0: never",
        FREE,
        least=0,
        group="logging",
    )
    metric: str = setting(
        "",
        "figure of the evaluation that decides which checkpoint is best; default: the task's",
        FREE,
        group="logging",
    )
    eval_batch_size: int = setting(
        64, "samples per forward pass of an evaluation", FREE, least=1, group="logging"
    )
    eval_precision: str = setting(
        "auto",
        "of evaluations; auto: TF32 where the GPU has it, else fp32",
        FREE,
        PRECISIONS,
        group="logging",
    )


def finetuned_average(decay: float = 0.9999) -> Any:
    """Declare --ema-decay of a task whose official recipe evaluates averaged weights."""
    return redefault(
        TrainConfig,
        "ema_decay",
        decay,
        "keep an average of the weights with this decay and evaluate it; 0: none",
        most=BELOW_1,
    )


def training_store(default: str, help: str) -> Any:
    """Declare a path of region stores of a finetuning run."""
    return setting(default, help, FREE, may_differ=True, names_store=True)


def store(default: str, help: str) -> Any:
    """Declare a path of region stores of an evaluation or the service."""
    return option(default, help, may_differ=True, names_store=True, group="data")


def photos(help: str = "photos named IMAGE_ID.jpg to show on the page") -> Any:
    """Declare a folder of photos."""
    return option("", help, may_differ=True, group="data")


@dataclass
class LoadConfig(Flags):
    """What everything is told that opens a trained model to use it."""

    GROUP: ClassVar[str] = "model"

    load: str = option(
        "",
        "a run's folder (its best, else its newest checkpoint), one global_stepN, a Hugging Face"
        " folder or a .bin",
        may_differ=True,
    )
    averaged: bool = option(
        True, "take the averaged weights (--ema-decay) of a checkpoint that has such"
    )
    vocab_file: str = option(
        "", "WordPiece vocabulary; default: that of the data or of the weights", may_differ=True
    )
    precision: str = option(
        "auto",
        "auto: TF32 where the GPU has it, else fp32; bf16: heads in fp32",
        PRECISIONS,
        group="parallelism",
    )
    kernels: str = option(
        "auto", "fused kernels", ("auto", "torch", "triton", "apex"), group="parallelism"
    )
    allow_other_detector: bool = option(
        False, "accept features of another detector than the model was trained on", group="data"
    )
    strict_boxes: bool = option(
        False, "refuse boxes outside the image instead of clipping them", group="data"
    )


@dataclass
class EvaluateConfig(LoadConfig):
    """What all evaluations are told."""

    GROUP: ClassVar[str] = "data"

    output: str = option(
        "",
        "folder for result.json and result.html; default: evaluation/TASK in the run's folder",
        group="logging",
    )
    tensor_model_parallel_size: int = option(
        1,
        "ranks that share each layer, under deepspeed or torchrun",
        least=1,
        group="parallelism",
        old_names=("--tp",),
    )
    hang_timeout: int = option(
        300,
        "end when no rank moves for four times so many seconds; 0: never",
        least=0,
        group="more",
    )

    TASK: ClassVar[str] = ""
