"""Kernels on a real GPU against their plain twins. Skips where there is no CUDA device."""

import itertools

import pytest
import torch

from megatron_interbert.kernels import attention, plain
from megatron_interbert.kernels.choice import choose_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


def test_varlen_attention_equals_the_plain_twin():
    lengths = [37, 5, 73, 1]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(sum(lengths), 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    weight = torch.randn_like(q)
    results = []
    for function in (plain.attention, attention.varlen_flash, attention.padded_sdpa):
        out = function(q, k, v, offsets, max(lengths), 0.0)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_kernels_equal_their_twins(dtype):
    kernels = choose_kernels("triton", torch.device("cuda"))

    def leaf(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)

    rows, width = 1000, 768
    cases = [
        (kernels.bias_gelu, plain.bias_gelu, (leaf(rows, 3072), leaf(3072))),
        (kernels.dropout_add_norm, plain.dropout_add_norm,
         (leaf(rows, width), leaf(width), leaf(rows, width), leaf(width), leaf(width), 0.0, 1e-12)),
    ]  # fmt: skip
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.5}
    for ours, twin, inputs in cases:
        outputs = [function(*inputs) for function in (ours, twin)]
        torch.testing.assert_close(*outputs, **tolerance)
        weight = torch.randn_like(outputs[0])
        tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
        for a, b in zip(*(torch.autograd.grad((o * weight).sum(), tensors) for o in outputs), strict=True):
            torch.testing.assert_close(a, b, **tolerance)
