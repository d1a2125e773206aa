"""What finetuning and evaluating a task of GLUE are told."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import FREE, SAME, TWO_TEXTS, option, redefault, setting
from megatron_interbert.tasks.config import EvaluateConfig, FinetuneConfig

GLUE_TASKS = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI")


@dataclass
class GlueConfig(FinetuneConfig):
    """One task of GLUE on the text path: interaction layers and text stream, as in BERT."""

    task: str = setting("SST-2", "task of GLUE", SAME, GLUE_TASKS)
    data_path: str = setting(
        "",
        "folder with the task's official TSV files (train.tsv, dev.tsv, test.tsv), or the one above"
        " it",
        FREE,
        may_differ=True,
    )
    epochs: float = redefault(FinetuneConfig, "epochs", 3.0)
    global_batch_size: int = redefault(FinetuneConfig, "global_batch_size", 32)
    micro_batch_size: int = redefault(FinetuneConfig, "micro_batch_size", 32)
    lr: float = redefault(FinetuneConfig, "lr", 2e-5)
    max_tokens: int = redefault(
        FinetuneConfig, "max_tokens", 128, "tokens with [CLS] and [SEP]", room_for=TWO_TEXTS
    )


@dataclass
class EvaluateGlueConfig(EvaluateConfig):
    """One task of GLUE: official metrics on its dev files, or prediction files for its test
    files.
    """

    TASK: ClassVar[str] = "glue"

    task: str = option("SST-2", "task of GLUE", GLUE_TASKS)
    data_path: str = option(
        "",
        "folder with the task's official TSV files, or the one above it",
        may_differ=True,
    )
    split: str = option("dev", "files to predict", ("dev", "test"))
    max_tokens: int = option(
        0, "tokens with [CLS] and [SEP]", least=0, room_for=TWO_TEXTS, as_trained=128
    )
    batch_size: int = option(64, "samples per forward pass", least=1, group="scoring")
