"""Where the rows of tokens lie between the sharded layers: all on every rank, or shared out
(sequence parallelism).

Shared out, what stands between two sharded layers (dropout, residual, norm) is done and remembered
once in a tensor-parallel group and not by each of its ranks. An all-reduce becomes a reduce-scatter
and an all-gather, which send as much; but the backward pass gathers what it did not keep once more,
so that a quarter to a third more is sent in all. From Korthikanti et al., "Reducing activation
recomputation in large transformer models" (arXiv 2205.05198).
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
    """How a layer y = x W^T + b multiplies: x [N, in], weight [out, in], bias [out], grad [N,
    out].
    """

    @staticmethod
    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give [N, out], with gradients by autograd."""

    @staticmethod
    def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Give [N, in]."""

    @staticmethod
    def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Give [out, in]."""


@dataclass(frozen=True)
class Placement:
    """Of one tensor-parallel group.

    `shared`: between the sharded layers each rank holds an equal part of the rows, in order.
    """

    group: dist.ProcessGroup | None = None
    shared: bool = False

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return group_size(self.group)

    def column_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, products: Products
    ) -> torch.Tensor:
        """Give all rows [N, out / ranks] of x W^T + b; x [N, in], or this rank's rows of it."""
        if self.ranks == 1:
            return products.linear(x, weight, bias)
        return _ColumnLinear.apply(x, weight, bias, self, products)

    def reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Give the sum of the ranks' partial results [N, H]: all rows of it, or this rank's."""
        return (
            scatter_sum(partial, self.group)
            if self.shared
            else reduce_from_group(partial, self.group)
        )

    def parameters(self, *vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Replicated vectors [H] that act on the rows of this rank: their gradients are summed over
        the ranks.
        """
        return copy_to_group(torch.stack(vectors), self.group).unbind() if self.shared else vectors

    def select(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Give the rows [R] of x by their numbers among all; shared out again, if they are."""
        if not self.shared:
            return x.index_select(0, rows)
        return all_gather_rows(x, self.group).index_select(
            0, rows.chunk(self.ranks)[group_rank(self.group)]
        )

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a replicated x, to be shared out."""
        return split_rows(x, self.group)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """Join all rows of an x that was shared out, replicated."""
        return join_rows(x, self.group)


class _ColumnLinear(torch.autograd.Function):
    """The backward pass communicates while it multiplies: rows arrive during the first product,
    gradients leave during the second.
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
        ctx.placement = placement
        ctx.products = products
        ctx.save_for_backward(x, weight)  # this rank's rows: the others come again
        if placement.shared:
            x, arrived = start_gather(x, placement.group)
            arrived.wait()

        return products.linear(x, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, None, None]:
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
