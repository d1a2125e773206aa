"""Multiply rows by the matrices of their experts: y_e = x_e W_e^T + b_e for the run of rows of each
expert.

Legend: rows x [N, in] are sorted by expert, `counts[e]` for each; weight [E, out, in], bias
[E, out]; y and its gradient [N, out].
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from megatron_interbert.kernels.products import PlainProducts

Counts = Sequence[int]


# the operands of a plain matrix product, by the name of a product in kernels/products.py
OPERANDS = {
    "linear": lambda x, weight: (x, weight.t()),
    "input_gradient": lambda grad, weight: (grad, weight),
    "weight_gradient": lambda grad, x: (grad.t(), x),
}


class OneByOne:
    """Compute one product after another, by `products` (kernels/products.py)."""

    @staticmethod
    def result(
        x: torch.Tensor, weight: torch.Tensor, counts: Counts, products: type
    ) -> torch.Tensor:
        """Return x_e W_e^T, end to end."""
        y = x.new_empty(len(x), weight.shape[1])
        for rows, matrix, of_y in zip(x.split(counts), weight, y.split(counts), strict=True):
            write_product(of_y, products, "linear", rows, matrix)

        return y

    @staticmethod
    def input_gradient(
        grad: torch.Tensor, weight: torch.Tensor, counts: Counts, products: type
    ) -> torch.Tensor:
        """Return the gradient of x."""
        found = grad.new_empty(len(grad), weight.shape[2])
        runs = zip(grad.split(counts), weight, found.split(counts), strict=True)
        for of_y, matrix, of_x in runs:
            write_product(of_x, products, "input_gradient", of_y, matrix)

        return found

    @staticmethod
    def weight_gradient(
        grad: torch.Tensor, x: torch.Tensor, counts: Counts, products: type
    ) -> torch.Tensor:
        """Return the gradient of the weight; that of an expert without rows is 0."""
        found = x.new_empty(len(counts), grad.shape[1], x.shape[1])
        for of_y, rows, matrix in zip(grad.split(counts), x.split(counts), found, strict=True):
            write_product(matrix, products, "weight_gradient", of_y, rows)

        return found


def write_product(
    out: torch.Tensor, products: type, name: str, first: torch.Tensor, second: torch.Tensor
) -> None:
    """Write a product of `products`, by name, to `out`: a plain one without a copy."""
    if products is PlainProducts or not len(first):  # products in 8 bits need rows
        torch.mm(*OPERANDS[name](first, second), out=out)
    else:
        out.copy_(getattr(products, name)(first, second))


class Together:
    """Compute all products in one launch, by torch's grouped product, in the operands' type."""

    @staticmethod
    def result(x: torch.Tensor, weight: torch.Tensor, counts: Counts, _: type) -> torch.Tensor:
        """Return x_e W_e^T, end to end."""
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
        found = F.grouped_mm(grad.t(), x, offs=ends(counts, x.device))
        idle = [expert for expert, rows in enumerate(counts) if not rows]
        if idle:  # what a kernel leaves there is not documented
            found[idle] = 0

        return found


def ends(counts: Counts, device: torch.device) -> torch.Tensor:
    """Return where the rows of each expert end: int32 [E]."""
    return torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


def is_aligned(weight: torch.Tensor) -> bool:
    """Check whether each row of a matrix, and of its transpose, is a multiple of 16 bytes."""
    return all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    counts: Counts,
    by: type,
    products: type,
) -> torch.Tensor:
    """Return y, with gradients by the same class `by` (OneByOne or Together)."""
    if not len(x) or not is_aligned(weight):  # which torch's grouped product refuses
        by = OneByOne

    return _GroupedLinear.apply(x, weight, bias, counts, by, products)


class _GroupedLinear(torch.autograd.Function):
    """Keep the weight itself for the backward pass, not views of it: ZeRO stage 3 frees it between
    the passes, and gathers it again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        counts: Counts,
        by: type,
        products: type,
    ) -> torch.Tensor:
        """Save x and the weight; return y."""
        ctx.save_for_backward(x, weight)
        ctx.arguments = (counts, products)
        ctx.by = by
        y = by.result(x, weight, counts, products)
        if bias is not None:
            for of_y, of_expert in zip(y.split(counts), bias, strict=True):
                of_y += of_expert

        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, the weight and, where there is one, the bias."""
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = ctx.by.input_gradient(grad, weight, *ctx.arguments)
        grad_weight = ctx.by.weight_gradient(grad, x, *ctx.arguments)
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = torch.stack([of_y.sum(0) for of_y in grad.split(ctx.arguments[0])])

        return grad_x, grad_weight, grad_bias, None, None, None
