"""Place token rows between sharded layers: all rows on every rank, or split among the ranks
(sequence parallelism).

With split rows, what is between two sharded layers (dropout, residual, norm) is computed and stored
once per tensor-parallel group, not by each of its ranks. An all-reduce becomes a reduce-scatter and
an all-gather, which send as much; but the backward pass gathers again what it did not keep, so a
quarter to a third more is sent in all. From Korthikanti et al., "Reducing activation recomputation
in large transformer models" (arXiv 2205.05198).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_interbert.parallel.collectives import (
    all_gather_rows,
    copy_to_group,
    group_rank,
    group_size,
    join_rows,
    reduce_from_group,
    scatter_sum,
    split_rows,
    start_gather,
    start_reduce_scatter,
)


class Products(Protocol):
    """Compute the products of a layer y = x W^T + b: x [N, in], weight [out, in], bias [out], grad
    [N, out].
    """

    @staticmethod
    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return y [N, out], differentiable by autograd."""

    @staticmethod
    def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x [N, in]."""

    @staticmethod
    def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the weight [out, in]."""


@dataclass(frozen=True)
class Placement:
    """Describe how one tensor-parallel group holds token rows.

    `shared`: between sharded layers each rank holds an equal part of the rows, in order.
    """

    group: dist.ProcessGroup | None = None
    shared: bool = False

    @property
    def ranks(self) -> int:
        """Return the number of ranks in the group."""
        return group_size(self.group)

    def column_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, products: Products
    ) -> torch.Tensor:
        """Return all rows [N, out / ranks] of x W^T + b; x is [N, in], or this rank's rows."""
        if self.ranks == 1:
            return products.linear(x, weight, bias)
        return _ColumnLinear.apply(x, weight, bias, self, products)

    def reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Return the sum of the ranks' partial results [N, H]: all rows, or this rank's."""
        return (
            scatter_sum(partial, self.group)
            if self.shared
            else reduce_from_group(partial, self.group)
        )

    def parameters(self, *vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return replicated vectors [H] to use on this rank's rows; with split rows their gradients
        are summed over the ranks.
        """
        return copy_to_group(torch.stack(vectors), self.group).unbind() if self.shared else vectors

    def select(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of x by index [R] among all rows; split over the ranks if x is."""
        if not self.shared:
            return x.index_select(0, rows)
        return all_gather_rows(x, self.group).index_select(
            0, rows.chunk(self.ranks)[group_rank(self.group)]
        )

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of a replicated x."""
        return split_rows(x, self.group)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """Return all rows of an x that is split over the ranks, replicated."""
        return join_rows(x, self.group)


class _ColumnLinear(torch.autograd.Function):
    """Overlap communication with the products of the backward pass: rows arrive during the first,
    gradients are sent during the second.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        placement: Placement,
        products: Products,
    ) -> torch.Tensor:
        """Save this rank's rows [n, in]; return the products of all rows [N, out]."""
        ctx.placement = placement
        ctx.products = products
        ctx.save_for_backward(x, weight)  # this rank's rows; the others are gathered again
        if placement.shared:
            x, arrived = start_gather(x, placement.group)
            arrived.wait()

        return products.linear(x, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, None, None]:
        """Return the gradients of this rank's rows, the weight and the bias, if there is one."""
        (x, weight), group, products = ctx.saved_tensors, ctx.placement.group, ctx.products
        if ctx.placement.shared:
            x, arrived = start_gather(x, group)
            whole = products.input_gradient(grad, weight)
            arrived.wait()
            grad_x, summed = start_reduce_scatter(whole, group)
        else:
            grad_x = products.input_gradient(grad, weight)
            summed = dist.all_reduce(grad_x, group=group, async_op=True)

        grad_weight = products.weight_gradient(grad, x)
        grad_bias = grad.sum(dim=0) if ctx.needs_input_grad[2] else None
        summed.wait()

        return grad_x, grad_weight, grad_bias, None, None
