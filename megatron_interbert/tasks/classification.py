"""Losses that are cross entropies of logits over a few classes, one or several kinds in a batch;
the downstream tasks.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F

from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.model.interbert import InterBertOutput


class ClassificationTask(ABC):
    """The mean cross entropy of each kind in `KINDS`, summed over kinds.

    A task says where its logits and labels are.
    """

    KINDS: tuple[str, ...] = ()

    @property
    def report_shape(self) -> tuple[int, int]:
        """Rows: kinds; columns: sum of losses, right answers, targets."""
        return len(self.KINDS), 3

    @abstractmethod
    def answers(
        self, output: InterBertOutput, batch: PackedBatch
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Give (logits float32 [n, classes], labels [n]) of each kind."""

    @abstractmethod
    def count_targets(self, batch: PackedBatch) -> torch.Tensor:
        """Count float64 [kinds]: labels of each kind in a batch."""

    def loss(
        self, output: InterBertOutput, batch: PackedBatch, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the batch's share of the step's loss and its report float32 [kinds, 3]."""
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
        """Give (sum of losses, right answers) of n samples."""
        return (
            F.cross_entropy(logits, labels, reduction="sum"),
            (logits.argmax(dim=1) == labels).sum().float(),
        )

    def metrics(self, report: torch.Tensor, steps: int = 1) -> dict[str, float]:
        """`loss`, and loss and accuracy of each kind, from a summed report."""
        values: dict[str, float] = {"loss": 0.0}
        for kind, (loss, right, targets) in zip(self.KINDS, report.double().tolist(), strict=True):
            values[f"{kind}_loss"] = loss / max(targets, 1.0)
            values[f"{kind}_accuracy"] = right / max(targets, 1.0)
            values["loss"] += values[f"{kind}_loss"]

        return values

    def line(self, values: dict[str, Any]) -> str:
        """`loss 0.41 | match 0.410 (82.1 %)`."""
        parts = [
            f"{kind} {values[f'{kind}_loss']:.3f} ({100 * values[f'{kind}_accuracy']:.1f} %)"
            for kind in self.KINDS
        ]
        return " | ".join([f"loss {values['loss']:.4f}", *parts])
