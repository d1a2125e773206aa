"""Compute the loss of the downstream tasks: cross entropy over a few classes, for one or more kinds
of target per batch.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F

from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.model.interbert import InterBertOutput


class ClassificationTask(ABC):
    """Compute the sum of the mean cross entropies of the kinds in `KINDS`.

    A subclass defines where its logits and labels come from.
    """

    KINDS: tuple[str, ...] = ()

    @property
    def report_shape(self) -> tuple[int, int]:
        """Return (kinds, 3); the columns are the sum of losses, right answers and targets."""
        return len(self.KINDS), 3

    @abstractmethod
    def answers(
        self, output: InterBertOutput, batch: PackedBatch
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (logits float32 [n, classes], labels [n]) of each kind."""

    @abstractmethod
    def count_targets(self, batch: PackedBatch) -> torch.Tensor:
        """Return the number of labels of each kind in a batch, float64 [kinds]."""

    def loss(
        self, output: InterBertOutput, batch: PackedBatch, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch's share of the step's loss, and the batch's report, float32 [kinds, 3].

        `totals` [kinds] are the target counts of the whole optimizer step.
        """
        losses = []
        rows = []

        for (logits, labels), total in zip(
            self.answers(output, batch), totals.to(torch.float32).unbind(), strict=True
        ):
            summed, right = self.summed(logits, labels)
            losses.append(summed / total.clamp(min=1.0))
            rows.append(torch.stack([summed.detach(), right, summed.new_tensor(len(labels))]))

        return torch.stack(losses).sum(), torch.stack(rows)

    @staticmethod
    def summed(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum of losses, number of right answers) of n samples."""
        return (
            F.cross_entropy(logits, labels, reduction="sum"),
            (logits.argmax(dim=1) == labels).sum().float(),
        )

    def metrics(self, report: torch.Tensor, steps: int = 1) -> dict[str, float]:
        """Return `loss`, and the loss and accuracy of each kind, from a summed report."""
        values: dict[str, float] = {"loss": 0.0}
        for kind, (loss, right, targets) in zip(self.KINDS, report.double().tolist(), strict=True):
            values[f"{kind}_loss"] = loss / max(targets, 1.0)
            values[f"{kind}_accuracy"] = right / max(targets, 1.0)
            values["loss"] += values[f"{kind}_loss"]

        return values

    def line(self, values: dict[str, Any]) -> str:
        """Return the text for a log line, such as `loss 0.4100 | match 0.410 (82.1 %)`."""
        parts = [
            f"{kind} {values[f'{kind}_loss']:.3f} ({100 * values[f'{kind}_accuracy']:.1f} %)"
            for kind in self.KINDS
        ]
        return " | ".join([f"loss {values['loss']:.4f}", *parts])
