"""Compute pretraining losses from padded labels: means over the targets in the batch, 0 without
any.

Legend: B samples, T text columns, R region columns, C classes; Nt and Nr real tokens and regions.
"""

import torch
import torch.nn.functional as F

from megatron_interbert.errors import UsageError
from megatron_interbert.hf.padding import Slots
from megatron_interbert.tasks.pretraining.region_losses import soft_label_kl

NO_TARGET = -100


def word_loss(logits: torch.Tensor, labels: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Return the cross entropy of logits [Nt, vocabulary] and labels [B, T], -100 = no target."""
    labels = labels.flatten()[slots.text]
    total = F.cross_entropy(logits, labels, ignore_index=NO_TARGET, reduction="sum")
    return total / (labels != NO_TARGET).sum().clamp(min=1)


def region_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    region_mask: torch.Tensor,
    matched_label: torch.Tensor | None,
    slots: Slots,
) -> torch.Tensor:
    """Return the KL divergence of logits [Nr, C] from class ids [B, R] (-100 = no target) or
    distributions [B, R, C], summed over classes.

    Only hidden regions (`region_mask` [B, R]) of matched pairs (`matched_label` [B] is 0) count.
    """
    wanted = region_mask != 0
    if matched_label is not None:
        wanted = wanted & (matched_label == 0)[:, None]

    wanted = wanted.flatten()[slots.regions]
    targets = targets.flatten(0, 1)[slots.regions]
    if targets.dim() == 1:
        wanted = wanted & (targets != NO_TARGET)
        class_ids = targets.where(wanted, 0)[:, None]
        probabilities = torch.ones_like(class_ids, dtype=torch.float32)
    else:
        # before the loss, because NaN in a target that does not count would reach the gradient
        probabilities = targets.float().where(wanted[:, None], 0.0)
        class_ids = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)

    divergence = soft_label_kl(logits, class_ids, probabilities)

    return divergence.where(wanted, 0.0).sum() / wanted.sum().clamp(min=1)


def check_labels(name: str, labels: torch.Tensor | None, *shapes: list[int]) -> None:
    """Raise UsageError if labels are given that have none of the shapes."""
    if labels is not None and list(labels.shape) not in shapes:
        raise UsageError(
            f"{name} has shape {list(labels.shape)}, expected {' or '.join(map(str, shapes))}"
        )
