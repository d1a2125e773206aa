"""Compute vocabulary projection and cross entropy in one operation, sharded over a tensor-parallel
group.

Legend: M target rows, H hidden size, V padded vocabulary, T ranks of the group, C = V / T columns
of this rank.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_interbert.parallel.collectives import group_rank, group_size
from megatron_interbert.parallel.placement import Products

CHUNK = 1 << 26  # logits that exist at a time: 128 MiB in 16 bits


class VocabMath(NamedTuple):
    """Hold the two passes over logits [m, C], whose columns from `words` on are padding (see
    kernels/plain.py), and the products with the table.
    """

    statistics: Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, ...]]
    gradient: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
    products: type[Products]


class _ProjectedCrossEntropy(torch.autograd.Function):
    """Compute logits chunk by chunk, since those of all rows would be a step's largest tensor.

    A single chunk is kept for the backward pass; several are recomputed there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        labels: torch.Tensor,
        words: int,
        group: dist.ProcessGroup | None,
        math: VocabMath,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Save the inputs and each row's log-sum-exp; return (loss [M], correct [M])."""
        local = labels - len(weight) * group_rank(group)
        rows = max(1, CHUNK // len(weight))
        found = []
        logits = None

        for part, of_part in zip(hidden.split(rows), local.split(rows), strict=True):
            logits = None  # free the last chunk before making the next
            logits = math.products.linear(part, weight, bias)
            found.append(math.statistics(logits, of_part, words))

        largest, total, own, best = (torch.cat(values) for values in zip(*found, strict=True))
        overall = _reduced(largest, group, dist.ReduceOp.MAX)
        total, own = _reduced(
            torch.stack([total * (largest - overall).exp(), own]), group, dist.ReduceOp.SUM
        )
        # The lowest index wins a tie, within a rank and across ranks.
        best = (best + len(weight) * group_rank(group)).masked_fill(
            largest < overall, torch.iinfo(best.dtype).max
        )
        right = _reduced(best, group, dist.ReduceOp.MIN) == labels
        normaliser = total.log() + overall
        ctx.save_for_backward(hidden, weight, bias, local, normaliser)
        ctx.logits = logits if len(found) == 1 else None
        ctx.words = words
        ctx.math = math
        ctx.rows = rows
        ctx.mark_non_differentiable(right)

        return normaliser - own, right

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor, _right: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias; overwrites a kept chunk of logits."""
        hidden, weight, bias, local, normaliser = ctx.saved_tensors
        # the gradient may be written over these
        logits = ctx.logits
        ctx.logits = None
        dhidden = torch.empty_like(hidden)
        dweight = torch.empty_like(weight)
        dbias = torch.zeros_like(bias)
        pieces = [x.split(ctx.rows) for x in (hidden, dhidden, local, normaliser, grad)]

        for number, (part, dpart, of_part, normal, dloss) in enumerate(zip(*pieces, strict=True)):
            if logits is None:
                logits = ctx.math.products.linear(part, weight, bias)

            dlogits = ctx.math.gradient(logits, of_part, normal, dloss, ctx.words)
            dpart.copy_(ctx.math.products.input_gradient(dlogits, weight))
            dweight.addmm_(dlogits.t(), part, beta=float(number > 0))  # the first one overwrites
            dbias += dlogits.sum(dim=0)
            logits = dlogits = None  # free both before making the next chunk

        return dhidden, dweight, dbias, None, None, None, None


def _reduced(
    tensor: torch.Tensor, group: dist.ProcessGroup | None, operation: dist.ReduceOp
) -> torch.Tensor:
    if group_size(group) > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor, op=operation, group=group)

    return tensor


def vocab_parallel_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    words: int,
    group: dist.ProcessGroup | None,
    math: VocabMath,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cross entropy of each row [M], whether its most likely word is the label [M]), the
    same on all ranks.

    Logits are hidden [M, H] times this rank's rows of the table `weight` [C, H], plus `bias` [C];
    `labels` [M] are in [0, V). `hidden` is replicated, and its gradient is only this rank's part:
    pass it through copy_to_group first.
    """
    if len(hidden) == 0:  # zero gradients for every parameter, so that none is missing
        nothing = hidden.sum() + weight[:1].sum() * 0.0 + bias[:1].sum() * 0.0
        return nothing.expand(0), labels == labels

    return _ProjectedCrossEntropy.apply(hidden, weight, bias, labels, words, group, math)
