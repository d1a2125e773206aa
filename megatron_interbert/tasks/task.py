"""What the training loop asks of a task; it knows nothing else of losses, heads or modalities."""

from typing import Any, Protocol

import torch


class Task(Protocol):
    """Loss and figures of one kind of batch. A report is a tensor that is summed over batches, steps and ranks."""

    report_shape: tuple[int, ...]

    def count_targets(self, batch: Any) -> torch.Tensor:
        """float64 [losses]: targets of each loss in a batch; the loop sums them over the whole optimizer step."""

    def loss(self, output: Any, batch: Any, totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's share of the step's loss, given the step's target counts, and the batch's report."""

    def metrics(self, report: torch.Tensor, steps: int = 1) -> dict[str, float]:
        """Named figures from a summed report of `steps` optimizer steps; `loss` is one of them."""

    def line(self, values: dict[str, float]) -> str:
        """The figures a person wants to see in a log line."""
