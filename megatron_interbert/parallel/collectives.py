"""Provide collectives over the tensor-parallel group with their gradients.

For a group of one rank, or None, they do nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# torch 2.13 renames these and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks in the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """Return this process's rank in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def start_gather(x: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """Start gathering all ranks' rows; return them [ranks x n, ..] in rank order, and the work to
    wait for before reading them.
    """
    rows = x.new_empty(x.shape[0] * group_size(group), *x.shape[1:])
    return rows, _all_gather(rows, x.contiguous(), group=group, async_op=True)


def start_reduce_scatter(
    x: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, dist.Work]:
    """Start summing all ranks' x [ranks x n, ..]; return this rank's rows of the sum [n, ..], and
    the work to wait for before reading them.
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
    """Apply one exchange in the forward pass and another in the backward pass."""

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
    """Pass a replicated activation into sharded layers: identity forward, gradients summed
    backward.
    """
    return _exchange(x, group, _same, _summed)


def reduce_from_group(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum partial results of sharded layers into a replicated activation; identity backward."""
    return _exchange(x, group, _summed, _same)


def all_gather_rows(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Pass split rows [n, ..] into sharded layers as [ranks x n, ..]: all-gather forward,
    reduce-scatter of gradients backward.
    """
    return _exchange(x, group, _gathered, _scattered)


def scatter_sum(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum partial results of sharded layers [ranks x n, ..] into split rows [n, ..]:
    reduce-scatter forward, all-gather of gradients backward.
    """
    return _exchange(x, group, _scattered, _gathered)


def split_rows(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Split a replicated activation [ranks x n, ..] into each rank's rows [n, ..]; gradients are
    gathered.
    """
    return _exchange(x, group, _own, _gathered)


def join_rows(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Join split rows [n, ..] into a replicated activation [ranks x n, ..], whose gradient must be
    the same on all ranks.
    """
    return _exchange(x, group, _gathered, _own)
