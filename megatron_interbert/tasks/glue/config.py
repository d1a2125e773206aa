"""Declare the flags for finetuning and evaluating on GLUE."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import FREE, SAME, TWO_TEXTS, option, redefault, setting
from megatron_interbert.tasks.config import EvaluateConfig, FinetuneConfig

GLUE_TASKS = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI")


@dataclass
class GlueConfig(FinetuneConfig):
    """Finetune on one GLUE task, text only: interaction layers and text stream, as in BERT."""

    task: str = setting("SST-2", "GLUE task", SAME, GLUE_TASKS)
    data_path: str = setting(
        "",
        "folder with the task's official TSV files (train.tsv, dev.tsv, test.tsv), or its parent"
        " folder",
        FREE,
        may_differ=True,
    )
    epochs: float = redefault(FinetuneConfig, "epochs", 3.0)
    global_batch_size: int = redefault(FinetuneConfig, "global_batch_size", 32)
    micro_batch_size: int = redefault(FinetuneConfig, "micro_batch_size", 32)
    lr: float = redefault(FinetuneConfig, "lr", 2e-5)
    max_tokens: int = redefault(
        FinetuneConfig, "max_tokens", 128, "tokens, [CLS] and [SEP] included", room_for=TWO_TEXTS
    )


@dataclass
class EvaluateGlueConfig(EvaluateConfig):
    """Evaluate one GLUE task: official metrics on dev files, prediction files for test files."""

    TASK: ClassVar[str] = "glue"

    task: str = option("SST-2", "GLUE task", GLUE_TASKS)
    data_path: str = option(
        "",
        "folder with the task's official TSV files, or its parent folder",
        may_differ=True,
    )
    split: str = option("dev", "files to predict", ("dev", "test"))
    max_tokens: int = option(
        0, "tokens, [CLS] and [SEP] included", least=0, room_for=TWO_TEXTS, as_trained=128
    )
    batch_size: int = option(64, "samples per forward pass", least=1, group="scoring")
