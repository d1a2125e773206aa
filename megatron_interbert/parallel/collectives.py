"""Collectives over the tensor-parallel group with their gradients.

A group of one rank (or None) costs nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# torch 2.13 has new names for these and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    """Give number of ranks; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def start_gather(x: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """Give all ranks' rows [ranks x n, ..] in the order of the ranks, and what to wait for before
    they are read.
    """
    rows = x.new_empty(x.shape[0] * group_size(group), *x.shape[1:])
    return rows, _all_gather(rows, x.contiguous(), group=group, async_op=True)


def start_reduce_scatter(
    x: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, dist.Work]:
    """This rank's rows [n, ..] of the sum of all ranks' x [ranks x n, ..], and what to wait for
    before they are read.
    """
    rows = x.new_empty(x.shape[0] // group_size(group), *x.shape[1:])
    return rows, _reduce_scatter(rows, x.contiguous(), group=group, async_op=True)


def _gathered(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    rows, work = start_gather(x, group)
    work.wait()
    return rows


def _scattered(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    rows, work = start_reduce_scatter(x, group)
    work.wait()
    return rows


def _own(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.chunk(group_size(group))[group_rank(group)].clone()


def _summed(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def _same(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.view_as(x)


Exchange = Callable[[torch.Tensor, dist.ProcessGroup], torch.Tensor]


class _Collective(torch.autograd.Function):
    """One exchange forward and another one backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, there: Exchange, back: Exchange
    ) -> torch.Tensor:
        ctx.group = group
        ctx.back = back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.back(grad, ctx.group), None, None, None


def _exchange(
    x: torch.Tensor, group: dist.ProcessGroup | None, there: Exchange, back: Exchange
) -> torch.Tensor:
    return x if group_size(group) == 1 else _Collective.apply(x, group, there, back)


def copy_to_group(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Identity forward, sum of gradients backward: a replicated activation enters sharded
    layers.
    """
    return _exchange(x, group, _same, _summed)


def reduce_from_group(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum forward, identity backward: partial results of sharded layers become a replicated
    activation.
    """
    return _exchange(x, group, _summed, _same)


def all_gather_rows(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Let rows that are shared out [n, ..] enter sharded layers [ranks x n, ..]: gathered forward,
    gradients summed and shared out backward.
    """
    return _exchange(x, group, _gathered, _scattered)


def scatter_sum(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Give partial results of sharded layers [ranks x n, ..] become rows shared out [n, ..]: summed
    forward, gathered backward.
    """
    return _exchange(x, group, _scattered, _gathered)


def split_rows(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """A replicated activation [ranks x n, ..] becomes rows shared out [n, ..]; gradients are
    gathered.
    """
    return _exchange(x, group, _own, _gathered)


def join_rows(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Join rows shared out [n, ..] become a replicated activation [ranks x n, ..], whose gradient
    is the same on all ranks.
    """
    return _exchange(x, group, _gathered, _own)
