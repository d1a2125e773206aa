"""Reorder rows whose inverse order is known: gather in the forward and the backward pass, where
indexing would scatter.
"""

from typing import Any

import torch


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def gather_rows(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return x[index] for x [N, ..] and index [M].

    `inverse` [N] is the row of the result that carries the gradient of each row of x. A row of x
    may appear several times only if its other copies get no gradient (padding).
    """
    return _GatherRows.apply(x, index, inverse)
