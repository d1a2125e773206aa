"""The matrix products of a linear layer, y = x W^T + b, and of its gradients: in the numbers' own
type, or in 8 bits.

In 8 bits each operand is divided by its own scale, so that its largest value is the largest of the
format: e4m3 (4 bits of exponent, 3 of mantissa) for values and weights, e5m2 for gradients, which
spread wider. Sums are float32, in the forward pass on Hopper those of the tensor cores, which hold
less. Formats and their use as in Micikevicius et al., "FP8 formats for deep learning" (arXiv
2209.05433); scales are those of the tensor at hand, not of earlier steps.
"""

from typing import Any

import torch
import torch.nn.functional as F

from megatron_interbert.config.model import FLOAT8_MULTIPLE


def has_scaled_products() -> bool:
    """Tell whether this torch has the products in 8 bits that `scaled_product` asks for."""
    return hasattr(F, "scaled_mm") and hasattr(F, "ScalingType")


class PlainProducts:
    """In the type of the operands: x [N, in], weight [out, in], bias [out], grad [N, out]."""

    @staticmethod
    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give [N, out], with gradients by autograd."""
        return F.linear(x, weight, bias)

    @staticmethod
    def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Give [N, in]."""
        return grad @ weight

    @staticmethod
    def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Give [out, in]."""
        return grad.t() @ x


class Float8Products:
    """The same in 8 bits; results have the type of x.

    Sizes of weights are multiples of FLOAT8_MULTIPLE, N is any.
    """

    @staticmethod
    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give [N, out], with gradients by autograd."""
        return _Float8Linear.apply(x, weight, bias)

    @staticmethod
    def input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Give [N, in]."""
        return scaled_product(
            quantise(grad, torch.float8_e5m2), quantise(weight, transposed=True), grad.dtype
        )

    @staticmethod
    def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Give [out, in]."""
        # here the sum runs over the tokens; empty ones add nothing
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
    """Give (x divided by its scale, in 8 bits and row-major, of x^T if `transposed`; the scale,
    float32). No host sync.
    """
    largest = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    # A scale that is not finite gives NaN or 0 everywhere; the gradient norm must see it, so it is
    # not clamped from above.
    scale = (largest / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    # in float32: a GPU would round a scale that is a tensor to the type of x
    eight = (x.float() / scale).to(dtype)

    return (eight.t() if transposed else eight).contiguous(), scale


def scaled_product(
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    fast: bool = False,
) -> torch.Tensor:
    """a [M, K] times the transpose of b [N, K], both quantised.

    `fast` sums in the tensor cores' own registers (Hopper).
    """
    whole = F.ScalingType.TensorWise
    return F.scaled_mm(
        a[0], b[0].t(), a[1], whole, b[1], whole, bias=bias, output_dtype=dtype, use_fast_accum=fast
    )


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return scaled_product(quantise(x), quantise(weight), x.dtype, bias, fast=True)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_bias = grad.sum(dim=0) if ctx.needs_input_grad[2] else None
        return (
            Float8Products.input_gradient(grad, weight),
            Float8Products.weight_gradient(grad, x),
            grad_bias,
        )
