"""Multiply rows by the matrices of their experts: y_e = x_e W_e^T for the run of rows of each
expert.

Legend: rows x [N, in] are sorted by expert, `counts[e]` for each; weight [E, out, in]; y and its
gradient [N, out].
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

Counts = Sequence[int]


class OneByOne:
    """Compute one product after another by `products` (kernels/products.py)."""

    @staticmethod
    def result(
        x: torch.Tensor, weight: torch.Tensor, counts: Counts, products: type
    ) -> torch.Tensor:
        """Return y."""
        runs = zip(x.split(counts), weight, strict=True)
        return torch.cat([products.linear(rows, matrix) for rows, matrix in runs])

    @staticmethod
    def input_gradient(
        grad: torch.Tensor, weight: torch.Tensor, counts: Counts, products: type
    ) -> torch.Tensor:
        """Return the gradient of x."""
        runs = zip(grad.split(counts), weight, strict=True)
        return torch.cat([products.input_gradient(rows, matrix) for rows, matrix in runs])

    @staticmethod
    def weight_gradient(
        grad: torch.Tensor, x: torch.Tensor, counts: Counts, products: type
    ) -> torch.Tensor:
        """Return the gradient of the weight; that of an expert without rows is 0."""
        found = x.new_empty(len(counts), grad.shape[1], x.shape[1])
        for matrix, of_y, rows in zip(found, grad.split(counts), x.split(counts), strict=True):
            if len(rows):
                matrix.copy_(products.weight_gradient(of_y, rows))
            else:
                matrix.zero_()

        return found


class Together:
    """Compute all products in one launch, by torch's grouped product, in the operands' type."""

    @staticmethod
    def result(x: torch.Tensor, weight: torch.Tensor, counts: Counts, _: type) -> torch.Tensor:
        """Return y."""
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends(counts, x.device))

    @staticmethod
    def input_gradient(
        grad: torch.Tensor, weight: torch.Tensor, counts: Counts, _: type
    ) -> torch.Tensor:
        """Return the gradient of x."""
        return F.grouped_mm(grad, weight, offs=ends(counts, grad.device))

    @staticmethod
    def weight_gradient(
        grad: torch.Tensor, x: torch.Tensor, counts: Counts, _: type
    ) -> torch.Tensor:
        """Return the gradient of the weight; that of an expert without rows is 0."""
        return F.grouped_mm(grad.t(), x, offs=ends(counts, x.device))


def ends(counts: Counts, device: torch.device) -> torch.Tensor:
    """Return where the rows of each expert end: int32 [E]."""
    return torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, counts: Counts, by: type, products: type
) -> torch.Tensor:
    """Return y, with gradients by the same class `by` (OneByOne or Together)."""
    return _GroupedLinear.apply(x, weight, counts, by, products)


class _GroupedLinear(torch.autograd.Function):
    """Keep the weight itself for the backward pass, not views of it: ZeRO stage 3 frees it between
    the passes, and gathers it again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: Counts, by: type, products: type
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.arguments = (counts, products)
        ctx.by = by

        return by.result(x, weight, counts, products)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = ctx.by.input_gradient(grad, weight, *ctx.arguments)
        grad_weight = ctx.by.weight_gradient(grad, x, *ctx.arguments)

        return grad_x, grad_weight, None, None, None
