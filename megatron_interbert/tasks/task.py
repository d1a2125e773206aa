"""Define the interface between the training loop and a task.

The loop knows nothing else of losses, heads or modalities.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.options import nearest
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.data.training_set import TrainingSet
from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.state import ParallelState


class Task(Protocol):
    """Compute the loss and metrics for one kind of batch.

    A report is a tensor that the loop sums over batches, steps and ranks.
    """

    report_shape: tuple[int, ...]

    def count_targets(self, batch: Any) -> torch.Tensor:
        """Return the number of targets of each loss in a batch, float64 [losses]; the loop sums
        them over the whole optimizer step.
        """

    def loss(
        self, output: Any, batch: Any, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch's share of the step's loss, and the batch's report.

        `totals` are the target counts of the whole optimizer step.
        """

    def metrics(self, report: torch.Tensor, steps: int = 1) -> dict[str, float]:
        """Return named metrics, `loss` among them, from a report summed over `steps` optimizer
        steps.
        """

    def line(self, values: dict[str, float]) -> str:
        """Return the text of these metrics for a log line."""


# Computes a model's metrics, the same on all ranks. At ZeRO stage 3 ranks gather the weights as
# they read them (parallel/shared_weights.py), so it reads parameters as attributes, in the main
# thread, and ranks communicate through the given state alone.
Evaluate = Callable[[nn.Module, ParallelState, torch.device], dict[str, float]]


@dataclass
class Job:
    """Hold what a run trains: a task with its samples, the parts of the model that it needs, and
    how it is judged.

    `data` is the record of the samples that checkpoints keep: store, manifest_sha256, detector,
    vocabulary, task. `evaluate` returns named metrics of a whole model on unseen samples; `metric`
    is the one by which checkpoints are compared, higher is better.
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
    figures: tuple[str, ...] = ()  # names that `metric` may have
    patience: int = 0  # evaluations without a better metric after which the run ends; 0: never
    valid_samples: TrainingSet | None = None  # for the losses of pretraining
    judged_images: frozenset[str] = frozenset()  # names of the images that it is evaluated on
    # drops the training samples with images of some names, and returns their ids
    leave_out: Callable[[Collection[str]], list[str]] | None = None
    # settings of what it is evaluated on; those of the run if there are none
    valid_configs: Sequence[TrainConfig] = ()
    # told the step and the metrics of every evaluation, in their order, also by a resumed run
    note_evaluation: Callable[[int, dict[str, float]], None] | None = None

    def __post_init__(self) -> None:
        if self.metric and self.metric not in self.figures:
            raise UsageError(
                f"--metric {self.metric}{nearest(self.metric, self.figures)}: expected one of"
                f" {', '.join(self.figures)}"
            )
