"""Compute the loss of pointing at regions."""

import torch
import torch.nn.functional as F

from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.model.interbert import InterBertOutput

NOTHING = -1e9  # the logit of a place without a region


class RegionTask:
    """Compute the loss of a task whose samples choose among regions.

    "binary": the binary cross entropy of each region with its score, summed over the regions of a
    sample. "softmax": the cross entropy over the regions of a sample with their scores, which are
    divided by their sum; a sample without a right region has none. Both are averaged over samples.
    """

    def __init__(self, name: str, loss: str) -> None:
        self.name = name
        self.kind = loss

    report_shape = (1, 3)

    @staticmethod
    def count_targets(batch: PackedBatch) -> torch.Tensor:
        """Return the number of samples of a batch, float64 [1]."""
        return torch.tensor([len(batch)], dtype=torch.float64)

    def loss(
        self, output: InterBertOutput, batch: PackedBatch, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch's share of the step's loss, and the report [1, 3]: sum of losses,
        samples whose best region is right, samples.
        """
        samples = len(batch)
        scores = batch.candidate_scores
        logits = output.task_outputs[self.name]
        table = in_rows(logits, batch, NOTHING)
        rights = in_rows(scores, batch, 0.0)

        if self.kind == "binary":
            summed = F.binary_cross_entropy_with_logits(logits, scores, reduction="sum")
        else:
            shares = rights / rights.sum(dim=1, keepdim=True).clamp(min=1e-6)
            summed = -(shares * table.log_softmax(dim=1)).sum()

        best = rights.gather(1, table.argmax(dim=1, keepdim=True))
        right = (best > 0).sum()
        report = torch.stack([summed.detach(), right.to(summed), summed.new_tensor(samples)])

        return summed / totals[0].to(summed).clamp(min=1.0), report[None]

    def metrics(self, report: torch.Tensor, steps: int = 1) -> dict[str, float]:
        """Return `loss` and the loss and accuracy of the task, from a summed report."""
        loss, right, samples = report.double()[0].tolist()
        values = {"loss": loss / max(samples, 1.0)}
        values[f"{self.name}_loss"] = values["loss"]
        values[f"{self.name}_accuracy"] = right / max(samples, 1.0)

        return values

    def line(self, values: dict[str, float]) -> str:
        """Return the text for a log line, such as `loss 0.4100 | refcoco 0.410 (82.1 %)`."""
        accuracy = 100 * values[f"{self.name}_accuracy"]
        return (
            f"loss {values['loss']:.4f} | {self.name} {values[f'{self.name}_loss']:.3f}"
            f" ({accuracy:.1f} %)"
        )


def in_rows(values: torch.Tensor, batch: PackedBatch, filling: float) -> torch.Tensor:
    """Return values [C] of candidates as a row for each sample, filled up where a sample has fewer:
    [B, most candidates].
    """
    table = values.new_full((len(batch), max(batch.max_candidates, 1)), filling)
    return table.index_put((batch.candidate_owner, batch.candidate_place), values)
