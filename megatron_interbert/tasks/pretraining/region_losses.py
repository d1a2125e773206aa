"""Compute the losses of masked regions: their classes and their features."""

import torch
import torch.nn.functional as F

from megatron_interbert.data.packing import PackedBatch


def soft_label_kl(
    logits: torch.Tensor, class_ids: torch.Tensor, class_probs: torch.Tensor
) -> torch.Tensor:
    """Return KL(detector || model) of each row [M], summed over classes, from logits float32 [M, C]
    and top-k labels [M, k].

    The probability that the k entries leave over is spread evenly over the other C - k classes.
    """
    log_model = F.log_softmax(logits, dim=1)
    listed = log_model.gather(1, class_ids)
    divergence = torch.xlogy(class_probs, class_probs).sum(dim=1) - (class_probs * listed).sum(
        dim=1
    )
    others = logits.shape[1] - class_ids.shape[1]

    if others > 0:
        rest = (1.0 - class_probs.sum(dim=1)).clamp(min=0.0)
        share = rest / others
        divergence = (
            divergence
            + torch.xlogy(rest, share)
            - share * (log_model.sum(dim=1) - listed.sum(dim=1))
        )

    return divergence


def hard_label(class_ids: torch.Tensor, class_probs: torch.Tensor) -> torch.Tensor:
    """Return the detector's most likely class [M] from top-k labels [M, k]."""
    return class_ids.gather(1, class_probs.argmax(dim=1, keepdim=True)).squeeze(1)


def hard_label_losses(
    logits: torch.Tensor,
    class_ids: torch.Tensor,
    class_probs: torch.Tensor,
    background: int | None,
    confidence: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cross entropy [M], label [M]) of the detector's most likely class that is not
    `background` (UNITER), from logits [M, C] and top-k labels [M, k]; of background if nothing else
    has a probability. With `confidence` a loss is multiplied by the label's probability (LXMERT,
    VOLTA).
    """
    objects = class_probs
    if background is not None:
        objects = class_probs.masked_fill(class_ids == background, 0.0)

    has_object = objects.amax(dim=1, keepdim=True) > 0
    best = torch.where(has_object, objects, class_probs).argmax(dim=1, keepdim=True)
    labels = class_ids.gather(1, best).squeeze(1)
    losses = F.cross_entropy(logits, labels, reduction="none")
    if confidence:
        losses = losses * class_probs.gather(1, best).squeeze(1)

    return losses, labels


def attribute_losses(logits: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy [M] of attributes [M] times the detector's confidence in them
    (LXMERT, VOLTA), from logits [M, attributes].
    """
    return F.cross_entropy(logits, ids, reduction="none") * probs


def feature_losses(
    features: torch.Tensor, batch: PackedBatch, normalise: bool, reduction: str
) -> torch.Tensor:
    """Return the squared errors [M] of predicted features [M, F]: summed over F or their mean, as
    `reduction` says. With `normalise` the true features are scaled to mean 0 and variance 1.
    """
    true = batch.features.index_select(0, batch.mrm_regions).float()
    if normalise:
        true = F.layer_norm(true, true.shape[1:])

    squares = (features - true).square()

    return squares.sum(dim=1) if reduction == "sum" else squares.mean(dim=1)
