"""Cross entropy and argmax over logits [M, V / ranks] that are shared out over a tensor-parallel group."""

import torch
import torch.distributed as dist

from megatron_interbert.parallel.collectives import group_rank, group_size


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group):
        columns = logits.shape[1]
        largest = logits.max(dim=1).values
        _reduce(largest, group, dist.ReduceOp.MAX)
        exponentials = (logits - largest[:, None]).exp_()
        local = labels - columns * group_rank(group)
        elsewhere = (local < 0) | (local >= columns)
        local = local.masked_fill(elsewhere, 0)
        own = logits.gather(1, local[:, None]).squeeze(1).masked_fill(elsewhere, 0.0)
        sums = torch.stack([exponentials.sum(dim=1), own])
        _reduce(sums, group, dist.ReduceOp.SUM)
        ctx.save_for_backward(exponentials.div_(sums[0][:, None]), local, elsewhere)
        return sums[0].log() + largest - sums[1]

    @staticmethod
    def backward(ctx, grad):
        probabilities, local, elsewhere = ctx.saved_tensors
        result = probabilities * grad[:, None]
        result.scatter_add_(1, local[:, None], (-grad).masked_fill(elsewhere, 0.0)[:, None])
        return result, None, None


def _reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None, operation: dist.ReduceOp) -> None:
    if group_size(group) > 1:
        dist.all_reduce(tensor, op=operation, group=group)


def vocab_parallel_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Loss of each row [M] float32, the same on all ranks, from float32 logits [M, V / ranks] and labels [M] in [0, V).

    Columns that stand for no word must hold -inf.
    """
    return _VocabParallelCrossEntropy.apply(logits.float(), labels, group)


def vocab_parallel_argmax(logits: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Index of the largest logit of each row [M], over all ranks; the lowest index wins a tie."""
    best, index = logits.detach().float().max(dim=1)
    index = index + logits.shape[1] * group_rank(group)
    if group_size(group) == 1:
        return index
    overall = best.clone()
    dist.all_reduce(overall, op=dist.ReduceOp.MAX, group=group)
    index = index.masked_fill(best < overall, torch.iinfo(torch.int64).max)
    dist.all_reduce(index, op=dist.ReduceOp.MIN, group=group)
    return index
