"""Declare the flags that all finetuning runs and all evaluations share; each task adds its own."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_interbert.config.options import (
    ABOVE_0,
    BELOW_1,
    FREE,
    Flags,
    flag,
    option,
    redefault,
    rows,
    setting,
)
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.errors import UsageError

PRECISIONS = ("auto", "fp32", "tf32", "bf16")  # of evaluations; tasks/precision.py resolves auto


@dataclass
class FinetuneConfig(TrainConfig):
    """Hold the settings shared by all finetuning runs."""

    GROUP: ClassVar[str] = "data"
    ELSEWHERE: ClassVar[dict[str, type]] = {"pretrain takes": RunConfig}

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
        "optimizer steps in the whole run; default: computed from --epochs",
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
        "stop after this many evaluations without a better --metric; 0: never",
        FREE,
        least=0,
        group="logging",
    )
    metric: str = setting(
        "",
        "evaluation metric that decides which checkpoint is best; default: the task's main metric",
        FREE,
        group="logging",
    )
    eval_batch_size: int = setting(
        64, "samples per forward pass of an evaluation", FREE, least=1, group="logging"
    )
    eval_precision: str = setting(
        "auto",
        "precision of evaluations; auto: TF32 if the GPU has it, else fp32",
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
        "keep an average of the weights with this decay, and evaluate that average; 0: none",
        most=BELOW_1,
    )


def training_store(default: str, help: str, may_differ: bool = True) -> Any:
    """Declare a flag that names region stores of a finetuning run."""
    return setting(default, help, FREE, may_differ=may_differ, names_store=True)


def refuse_idle_stores(config: FinetuneConfig) -> None:
    """Raise UsageError if validation stores are given to a run that evaluates on nothing."""
    valid = [(name, facts.names_store) for name, facts in rows(config) if name.startswith("valid_")]
    idle = [name for name, is_store in valid if is_store and getattr(config, name)]
    samples = next(flag(name) for name, is_store in valid if not is_store)

    if idle:
        raise UsageError(
            f"{config.told(idle[0])}: nothing is evaluated on it; give {samples} too, or leave it"
            " out"
        )


def store(default: str, help: str) -> Any:
    """Declare a flag that names region stores of an evaluation or of the service."""
    return option(default, help, may_differ=True, names_store=True, group="data")


def photos(help: str = "photos named IMAGE_ID.jpg to show on the page") -> Any:
    """Declare a flag that names a folder of photos."""
    return option("", help, may_differ=True, group="data")


def benchmark(*names: str) -> Any:
    """Declare --benchmark, which says that the data of an evaluation are one of these."""
    return option(
        "",
        "the data are this benchmark's: show published figures beside ours",
        ("", *names),
        group="logging",
    )


@dataclass
class LoadConfig(Flags):
    """Hold the settings of everything that uses a trained model."""

    GROUP: ClassVar[str] = "model"

    load: str = option(
        "",
        "a run's folder (its best, else its newest checkpoint), one global_stepN, a Hugging Face"
        " folder or a .bin",
        may_differ=True,
    )
    averaged: bool = option(
        True, "use the averaged weights (--ema-decay) if the checkpoint has them"
    )
    vocab_file: str = option(
        "", "WordPiece vocabulary; default: vocab.txt beside the data or weights", may_differ=True
    )
    precision: str = option(
        "auto",
        "auto: TF32 if the GPU has it, else fp32; bf16 keeps the heads in fp32",
        PRECISIONS,
        group="parallelism",
    )
    kernels: str = option(
        "auto", "fused kernels", ("auto", "torch", "triton", "apex"), group="parallelism"
    )
    allow_other_detector: bool = option(
        False, "accept features of a detector that the model was not trained on", group="data"
    )
    strict_boxes: bool = option(
        False, "refuse boxes outside the image instead of clipping them", group="data"
    )


@dataclass
class EvaluateConfig(LoadConfig):
    """Hold the settings shared by all evaluations."""

    GROUP: ClassVar[str] = "data"
    ELSEWHERE: ClassVar[dict[str, type]] = {
        "pretrain and finetune take": TrainConfig,
        "pretrain takes": RunConfig,
    }

    output: str = option(
        "",
        "folder for result.json and result.html; default: evaluation/TASK in the run's folder",
        group="logging",
    )
    tensor_model_parallel_size: int = option(
        1,
        "ranks that split each layer, under deepspeed or torchrun",
        least=1,
        group="parallelism",
        old_names=("--tp",),
    )
    hang_timeout: int = option(
        300,
        "end if no rank advances for 4 times this many seconds; 0: never",
        least=0,
        group="more",
    )

    TASK: ClassVar[str] = ""
