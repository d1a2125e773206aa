"""Reordering rows when the way back is known: a gather forward and a gather backward, where
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
    """x[index] for x [N, ..], index [M].

    `inverse` [N] is the place in the result that carries each row's gradient.

    A row of x may appear several times only if its other copies get no gradient (padding).
    """
    return _GatherRows.apply(x, index, inverse)
