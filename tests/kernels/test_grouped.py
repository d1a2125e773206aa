"""Test the products of experts against plain loops in float64: one by one and together, in the type
of the operands and in 8 bits, with experts that have no rows.
"""

import pytest
import torch

from megatron_interbert.kernels.grouped import OneByOne, Together, grouped_linear
from megatron_interbert.kernels.products import Float8Products, PlainProducts, WideProducts

BOTH = (OneByOne, Together)
COUNTS = [5, 0, 16, 3]


def expected(x, weight, bias, cotangent):
    """Return results and gradients of a loop in float64."""
    inputs = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    wide, matrices, vectors = inputs
    runs = zip(wide.split(COUNTS), matrices, vectors, strict=True)
    y = torch.cat([rows @ matrix.T + vector for rows, matrix, vector in runs])

    return [y, *torch.autograd.grad((y * cotangent.double()).sum(), inputs)]


@pytest.mark.parametrize(
    ("by", "products", "dtype", "tolerance"),
    [
        (OneByOne, PlainProducts, torch.float32, 1e-5),
        (OneByOne, PlainProducts, torch.bfloat16, 0.02),
        (OneByOne, WideProducts, torch.bfloat16, 0.02),
        (OneByOne, Float8Products, torch.bfloat16, 0.15),
        (Together, PlainProducts, torch.bfloat16, 0.02),
    ],
)
def test_products_of_experts(by, products, dtype, tolerance):
    torch.manual_seed(0)
    x, cotangent = (torch.randn(sum(COUNTS), width).to(dtype) for width in (32, 48))
    weight = torch.randn(len(COUNTS), 48, 32).to(dtype)
    bias = torch.randn(len(COUNTS), 48).to(dtype)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    y = grouped_linear(*inputs, COUNTS, by, products)
    found = [y, *torch.autograd.grad((y * cotangent).sum(), inputs)]

    for ours, theirs in zip(found, expected(x, weight, bias, cotangent), strict=True):
        assert ours.dtype == dtype
        worst = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert worst < tolerance
    assert not found[2][1].any(), "the gradient of an expert without rows"


@pytest.mark.parametrize("by", BOTH)
def test_no_rows_at_all(by):
    x = torch.zeros(0, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2, 48, 32).bfloat16().requires_grad_()
    y = grouped_linear(x, weight, None, [0, 0], by, PlainProducts)
    y.sum().backward()
    assert y.shape == (0, 48)
    assert not weight.grad.any()


def test_sizes_that_grouped_products_refuse():
    """Take rows of 60 and 90 bytes: torch's grouped product wants multiples of 16."""
    torch.manual_seed(0)
    x = torch.randn(5, 30).bfloat16()
    weight = torch.randn(2, 45, 30).bfloat16().requires_grad_()
    found = [grouped_linear(x, weight, None, [2, 3], by, PlainProducts) for by in BOTH]
    assert torch.equal(*found)
    found[1].sum().backward()
