"""Compute the matrix products of a linear layer, y = x W^T + b, and of its gradients, in the type
of the operands, in float32, or in 8 bits.

In 8 bits each operand is divided by its own scale, so that its largest value becomes the largest of
the format: e4m3 (4 bits of exponent, 3 of mantissa) for activations and weights, e5m2 for
gradients, whose range is wider. Sums are float32, except in the forward pass on Hopper, where the
tensor cores' accumulators hold fewer bits. Formats and their use follow Micikevicius et al., "FP8
formats for deep learning" (arXiv 2209.05433); scales are computed from the current tensor, not from
earlier steps.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from megatron_interbert.config.model import FLOAT8_MULTIPLE

# numbers of float32 tensors
SMALL = 1 << 19  # below it gaps in memory do not matter
LARGE = 1 << 21  # from it on memory goes back to the system when freed; see machines/host.py


def has_scaled_products() -> bool:
    """Check whether this torch has the 8-bit products that `scaled_product` uses."""
    return hasattr(F, "scaled_mm") and hasattr(F, "ScalingType")


def has_bfloat16_products() -> bool:
    """Check whether this processor multiplies matrices in bfloat16 (on x86, with AVX-512)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PlainProducts:
    """Multiply in the operands' type: x [N, in], weight [out, in], bias [out], grad [N, out]."""

    @staticmethod
    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the product [N, out], with gradients by autograd."""
        return F.linear(x, weight, bias)

    @staticmethod
    def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x [N, in]."""
        return grad @ weight

    @staticmethod
    def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the weight [out, in]."""
        return grad.t() @ x


class WideProducts:
    """Multiply in float32 and round the result to the operands' type, with the signatures of
    PlainProducts: for processors without products in bfloat16, where torch's own loops take up to
    a hundred times as long.
    """

    @staticmethod
    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the product [N, out], with gradients by autograd."""
        if x.dtype.itemsize > 2:
            return F.linear(x, weight, bias)
        return _Linear.apply(x, weight, bias, WideProducts)

    @staticmethod
    def result(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the product [N, out], without gradients."""
        wide_bias = None if bias is None else bias.float()
        return F.linear(widened(x), widened(weight), wide_bias).to(x.dtype)

    @staticmethod
    def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x [N, in]."""
        return (widened(grad) @ widened(weight)).to(grad.dtype)

    @staticmethod
    def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the weight [out, in]."""
        found = block((grad.shape[1], x.shape[1]))
        return torch.mm(widened(grad).t(), widened(x), out=found).to(x.dtype)


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32, in a block of its own."""
    return block(x.shape).copy_(x)


def block(shape: Sequence[int]) -> torch.Tensor:
    """Return an empty float32 tensor; one of some size is in memory that goes back to the system
    when it is freed: among gradients that stay, it would leave a gap that nothing fills.
    """
    size = math.prod(shape)
    room = size if size < SMALL else max(size, LARGE)

    return torch.empty(room)[:size].view(shape)


class Float8Products:
    """Multiply in 8 bits, with the signatures of PlainProducts; results have the type of x or grad.

    Both sizes of a weight must be multiples of FLOAT8_MULTIPLE; N may be any number.
    """

    @staticmethod
    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the product [N, out], with gradients by autograd."""
        return _Linear.apply(x, weight, bias, Float8Products)

    @staticmethod
    def result(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the product [N, out], without gradients."""
        return scaled_product(quantise(x), quantise(weight), x.dtype, bias, fast=True)

    @staticmethod
    def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x [N, in]."""
        return scaled_product(
            quantise(grad, torch.float8_e5m2), quantise(weight, transposed=True), grad.dtype
        )

    @staticmethod
    def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the weight [out, in]."""
        # the sum is over the tokens, to which padding adds nothing
        if more := -len(x) % FLOAT8_MULTIPLE:
            grad = F.pad(grad, (0, 0, 0, more))
            x = F.pad(x, (0, 0, 0, more))

        return scaled_product(
            quantise(grad, torch.float8_e5m2, transposed=True),
            quantise(x, transposed=True),
            x.dtype,
        )


def quantise(
    x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x, or x^T if `transposed`, divided by its scale, in 8 bits and row-major; the scale,
    float32), without synchronising with the device.
    """
    largest = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    # A scale that is not finite gives NaN or 0 everywhere; the gradient norm must see it, so it is
    # not clamped from above.
    scale = (largest / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    # in float32, because a GPU would round a scale that is a tensor to the type of x
    eight = (x.float() / scale).to(dtype)

    return (eight.t() if transposed else eight).contiguous(), scale


def scaled_product(
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    fast: bool = False,
) -> torch.Tensor:
    """Return a [M, K] times the transpose of b [N, K], both quantised, in `dtype`.

    `fast` sums in the accumulators of the tensor cores (Hopper).
    """
    whole = F.ScalingType.TensorWise
    return F.scaled_mm(
        a[0], b[0].t(), a[1], whole, b[1], whole, bias=bias, output_dtype=dtype, use_fast_accum=fast
    )


class _Linear(torch.autograd.Function):
    """Compute y = x W^T + b and its gradients by the products of one class."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        products: type[WideProducts] | type[Float8Products],
    ) -> torch.Tensor:
        """Save the operands; return y [N, out]."""
        ctx.save_for_backward(x, weight)
        ctx.products = products

        return products.result(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, where it needs one, weight and bias."""
        x, weight = ctx.saved_tensors
        return (
            ctx.products.input_gradient(grad, weight) if ctx.needs_input_grad[0] else None,
            ctx.products.weight_gradient(grad, x),
            grad.sum(dim=0) if ctx.needs_input_grad[2] else None,
            None,
        )
