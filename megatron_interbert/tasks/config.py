"""What every finetuning run and every evaluation is told; each task adds its own in its folder."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config import Flags, TrainConfig, option
from megatron_interbert.errors import UsageError

TWO_TEXTS = "[CLS] word [SEP] word [SEP]"

PRECISIONS = ("auto", "fp32", "tf32", "bf16")  # of evaluations; what auto is: tasks/precision.py


@dataclass
class FinetuneConfig(TrainConfig):
    """Flags that all downstream tasks share."""

    model: str = option("", "preset or JSON file of model sizes; default: those of --init-from, else base")
    train_iters: int = option(0, "optimizer steps in the whole run; default: by --epochs")
    epochs: float = option(20.0, "passes over the training data", least=0)
    micro_batch_size: int = option(8, "samples per rank and forward pass; auto: by trial", auto=True)
    global_batch_size: int = option(64, "samples per optimizer step over all ranks")
    data_partitions: int = option(
        8,
        "logical partitions of the data, a multiple of the data-parallel size; default: 8, or as many"
        " as fit",
    )
    early_stopping: int = option(0, "stop after so many evaluations without a better --metric; 0: never")
    metric: str = option("", "figure of the evaluation that decides which checkpoint is best; default: the task's")
    eval_batch_size: int = option(64, "samples per forward pass of an evaluation")
    eval_precision: str = option("auto", "of evaluations; auto: TF32 where the GPU has it, else fp32", PRECISIONS)

    POSITIVE: ClassVar[tuple[str, ...]] = (*(name for name in TrainConfig.POSITIVE if name != "train_iters"), "eval_batch_size")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*TrainConfig.NOT_NEGATIVE, "train_iters", "early_stopping")

    def check(self) -> None:
        """UsageError for values that contradict each other or have no meaning."""
        super().check()
        if self.epochs <= 0:
            raise UsageError(f"--epochs is {self.epochs}, expected more than 0")


@dataclass
class LoadConfig(Flags):
    """Flags of everything that opens a trained model to use it."""

    load: str = option(
        "", "a run's folder (its best, else its newest checkpoint), one global_stepN, a Hugging Face folder or a .bin"
    )
    averaged: bool = option(True, "take the averaged weights (--ema-decay) of a checkpoint that has such")
    vocab_file: str = option("", "WordPiece vocabulary; default: that of the data or of the weights")
    precision: str = option("auto", "auto: TF32 where the GPU has it, else fp32; bf16: heads in fp32", PRECISIONS)
    kernels: str = option("auto", "fused kernels", ("auto", "torch", "triton", "apex"))
    allow_other_detector: bool = option(False, "accept features of another detector than the model was trained on")
    strict_boxes: bool = option(False, "refuse boxes outside the image instead of clipping them")


@dataclass
class EvaluateConfig(LoadConfig):
    """Flags that all evaluations share."""

    output: str = option("", "folder for result.json and result.html; default: evaluation/TASK in the run's folder")
    tensor_model_parallel_size: int = option(1, "ranks that share each layer, under deepspeed or torchrun")
    hang_timeout: int = option(300, "end when no rank moves for four times so many seconds; 0: never")
    TASK: ClassVar[str] = ""
    POSITIVE: ClassVar[tuple[str, ...]] = ("tensor_model_parallel_size",)
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("hang_timeout",)
