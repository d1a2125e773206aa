"""What the training loop asks of a task; it knows nothing else of losses, heads or modalities."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.options import nearest
from megatron_interbert.data.training_set import TrainingSet
from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.state import ParallelState


class Task(Protocol):
    """Loss and figures of one kind of batch.

    A report is a tensor that is summed over batches, steps and ranks.
    """

    report_shape: tuple[int, ...]

    def count_targets(self, batch: Any) -> torch.Tensor:
        """Count float64 [losses]: targets of each loss in a batch; the loop sums them over the
        whole optimizer step.
        """

    def loss(
        self, output: Any, batch: Any, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the batch's share of the step's loss, given the step's target counts, and the
        batch's report.
        """

    def metrics(self, report: torch.Tensor, steps: int = 1) -> dict[str, float]:
        """Named figures from a summed report of `steps` optimizer steps; `loss` is one of them."""

    def line(self, values: dict[str, float]) -> str:
        """Give the figures a person wants to see in a log line."""


# a model's figures, the same on all ranks
Evaluate = Callable[[nn.Module, ParallelState, torch.device], dict[str, float]]


@dataclass
class Job:
    """What a run trains: a task with its samples, the parts of the model it needs, and how it is
    judged.

    `data` is what checkpoints remember of the samples: store, manifest_sha256, detector,
    vocabulary, task. `evaluate` gives named figures of a whole model on unseen samples; `metric` is
    the one by which checkpoints are compared, higher is better.
    """

    task: Task
    samples: TrainingSet
    model_config: ModelConfig
    heads: tuple[str, ...]
    data: dict[str, Any]
    vocabulary: str  # file
    model_options: dict[str, Any] = field(default_factory=dict)  # further arguments of InterBert
    evaluate: Evaluate | None = None
    metric: str = ""
    figures: tuple[str, ...] = ()  # names that may be the metric
    patience: int = 0  # evaluations without a better figure after which the run ends; 0: never
    valid_samples: TrainingSet | None = None  # for the losses of pretraining

    def __post_init__(self) -> None:
        if self.metric and self.metric not in self.figures:
            raise UsageError(
                f"--metric {self.metric}: expected one of"
                f" {', '.join(self.figures)}{nearest(self.metric, self.figures)}"
            )
