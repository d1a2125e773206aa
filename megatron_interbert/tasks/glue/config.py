"""What finetuning and evaluating a task of GLUE are told."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config import option
from megatron_interbert.tasks.config import TWO_TEXTS, EvaluateConfig, FinetuneConfig

GLUE_TASKS = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI")


@dataclass
class GlueConfig(FinetuneConfig):
    """One task of GLUE on the text path: interaction layers and text stream, as in BERT."""

    task: str = option("SST-2", "task of GLUE", GLUE_TASKS)
    data_path: str = option("", "folder with the task's official TSV files (train.tsv, dev.tsv, test.tsv), or the one above it")
    epochs: float = option(3.0, "passes over the training data", least=0)
    global_batch_size: int = option(32, "samples per optimizer step over all ranks")
    micro_batch_size: int = option(32, "samples per rank and forward pass; auto: by trial", auto=True)
    lr: float = option(2e-5, "peak learning rate", least=0)
    max_tokens: int = option(128, "tokens with [CLS] and [SEP]")

    SAME_SAMPLES: ClassVar[tuple[str, ...]] = (*FinetuneConfig.SAME_SAMPLES, "task")
    SHORTEST: ClassVar[str] = TWO_TEXTS


@dataclass
class EvaluateGlueConfig(EvaluateConfig):
    """One task of GLUE: official metrics on its dev files, or prediction files for its test files."""

    task: str = option("SST-2", "task of GLUE", GLUE_TASKS)
    data_path: str = option("", "folder with the task's official TSV files, or the one above it")
    split: str = option("dev", "files to predict", ("dev", "test"))
    max_tokens: int = option(0, "tokens with [CLS] and [SEP]; default: as the weights were trained, else 128")
    batch_size: int = option(64, "samples per forward pass")
    TASK: ClassVar[str] = "glue"
    POSITIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.POSITIVE, "batch_size")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.NOT_NEGATIVE, "max_tokens")
    SHORTEST: ClassVar[str] = TWO_TEXTS
