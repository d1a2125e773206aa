"""Test products against float64: those in 8 bits are exact for the quantised values, and within the
formats' precision for the original ones; wide ones are rounded once.
"""

import pytest
import torch

from megatron_interbert.kernels.products import (
    Float8Products,
    PlainProducts,
    WideProducts,
    quantise,
)

IN = 64
OUT = 48


def made(
    tokens: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make x, weight, bias and a gradient of the result, of very different magnitudes."""
    random = torch.Generator().manual_seed(seed)
    shapes = ((tokens, IN, 3.0), (OUT, IN, 0.02), (OUT, 1, 0.1), (tokens, OUT, 1e-6))
    x, weight, bias, grad = (
        (torch.randn(rows, columns, generator=random) * size).to(dtype)
        for rows, columns, size in shapes
    )

    return x, weight, bias.flatten(), grad


def whole(x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Return x, quantised to 8 bits, as float64."""
    eight, scale = quantise(x, dtype)
    return eight.double() * scale.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7, 16, 33])
def test_results_and_gradients(tokens: int, dtype: torch.dtype) -> None:
    x, weight, bias, grad = made(tokens, dtype, tokens)
    leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, bias)]
    result = Float8Products.linear(*leaves)
    result.backward(grad)
    x8 = whole(x)
    weight8 = whole(weight)
    grad8 = whole(grad, torch.float8_e5m2)
    quantised = (
        x8 @ weight8.t() + bias.double(),
        grad8 @ weight8,
        grad8.t() @ x8,
        grad.double().sum(dim=0),
    )
    unharmed = [leaf.detach().double().requires_grad_() for leaf in leaves]
    plain = PlainProducts.linear(*unharmed)
    plain.backward(grad.double())
    exact = (plain.detach(), *(leaf.grad for leaf in unharmed))

    for name, found, expected, true in zip(
        ("y", "dx", "dW", "db"),
        (result.detach(), *(leaf.grad for leaf in leaves)),
        quantised,
        exact,
        strict=True,
    ):
        assert found.dtype == dtype
        step = torch.finfo(dtype).eps * float(expected.abs().max())
        assert float((found.double() - expected).abs().max()) <= 8 * step, name
        # 3 and 2 bits of mantissa: errors of at most 1/16 and 1/8; over a sum they average out
        assert float((found.double() - true).norm() / true.norm()) < 0.08, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_wide_products_are_rounded_once(tokens: int, dtype: torch.dtype) -> None:
    x, weight, bias, grad = made(tokens, dtype, tokens)
    leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, bias)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    result = WideProducts.linear(*leaves)
    result.backward(grad)
    expected = PlainProducts.linear(*exact)
    expected.backward(grad.double())
    # half a unit in the last place of bfloat16, and a few of float32
    close = 2**-8 if dtype == torch.bfloat16 else 2**-20

    for found, true in zip(
        (result.detach(), *(leaf.grad for leaf in leaves)),
        (expected.detach(), *(leaf.grad for leaf in exact)),
        strict=True,
    ):
        assert found.dtype == dtype
        assert found.shape == true.shape
        torch.testing.assert_close(found.double(), true, rtol=close, atol=2**-20 * largest(true))


def largest(x: torch.Tensor) -> float:
    """Return the largest magnitude of a tensor; 0 if it is empty."""
    return float(x.abs().max()) if x.numel() else 0.0


def test_scales_reach_the_ends_of_the_formats() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for size in (1e-30, 1.0, 1e30):
            x = torch.tensor([[-size, size / 2, 0.0]])
            eight, scale = quantise(x, dtype)
            assert eight.float().abs().max() == torch.finfo(dtype).max
            torch.testing.assert_close(eight.float() * scale, x)

    zeros, scale = quantise(torch.zeros(2, 3))
    assert not zeros.float().any()
    assert scale > 0
    assert quantise(torch.zeros(0, 3))[0].shape == (0, 3)


def test_half_precision_is_rounded_once() -> None:
    x = made(33, torch.bfloat16, 5)[0]
    for once, twice in zip(
        quantise(x.float(), transposed=True), quantise(x, transposed=True), strict=True
    ):
        assert torch.equal(once.float(), twice.float())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_hidden(wrong: float) -> None:
    x, weight, bias, grad = made(5, torch.bfloat16, 0)
    grad[2, 3] = wrong
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    Float8Products.linear(*leaves).backward(grad)
    assert not any(bool(leaf.grad.isfinite().all()) for leaf in leaves)


def test_no_rows() -> None:
    x = torch.zeros(0, IN, dtype=torch.bfloat16, requires_grad=True)
    weight = made(1, torch.bfloat16, 0)[1].requires_grad_()
    result = Float8Products.linear(x, weight)
    assert result.shape == (0, OUT)
    result.sum().backward()
    assert x.grad.shape == (0, IN)
    assert not weight.grad.any()
