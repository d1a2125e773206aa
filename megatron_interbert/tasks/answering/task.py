"""Compute the loss of choosing among fixed answers."""

import torch
import torch.nn.functional as F

from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.model.interbert import InterBertOutput
from megatron_interbert.tasks.classification import ClassificationTask


class AnswerTask(ClassificationTask):
    """Compute the loss of a task whose samples have several answers with scores, or one.

    With `soft` answers it is the binary cross entropy of each answer, summed over answers and
    averaged over samples; else the cross entropy of the right one. An accuracy is the score of the
    most likely answer.
    """

    def __init__(self, name: str, images: int, soft: bool) -> None:
        self.name = name
        self.images = images  # batch rows of a sample
        self.soft = soft
        self.KINDS = (name,)

    def answers(
        self, output: InterBertOutput, batch: PackedBatch
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (logits [n, answers], scores [n, answers]) of the n samples."""
        logits = output.task_outputs[self.name]
        scores = torch.zeros_like(logits)
        scores[batch.label_owner, batch.labels] = batch.label_scores

        return [(logits, scores)]

    def count_targets(self, batch: PackedBatch) -> torch.Tensor:
        return torch.tensor([len(batch) // self.images], dtype=torch.float64)

    def summed(
        self, logits: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum of losses, sum of the scores of the most likely answers) of n samples."""
        best = scores.gather(1, logits.argmax(dim=1, keepdim=True)).sum()
        if self.soft:
            return F.binary_cross_entropy_with_logits(logits, scores, reduction="sum"), best

        return F.cross_entropy(logits, scores, reduction="sum"), best
