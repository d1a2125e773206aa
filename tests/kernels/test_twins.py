"""Test torch's and the CPU's kernels against their plain twins: values, gradients, dropout."""

import subprocess
import sys

import pytest
import torch

from megatron_interbert.kernels import attention, cpu_ops, plain
from megatron_interbert.kernels.gather import gather_rows
from tests.kernels.sequences import packed
from tests.launching import ROOT


@pytest.mark.parametrize("lengths", [[5], [1, 7, 3], [4, 0, 2], [0, 3]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_padded_sdpa_equals_one_sequence_at_a_time(lengths, dtype):
    torch.manual_seed(0)
    qkv, sequences = packed(lengths, dtype=dtype)
    weight = torch.randn(sum(lengths), 3, 8, dtype=dtype)
    results = []
    gradients = []

    for function in (plain.attention, attention.padded_sdpa, cpu_ops.attention):
        # So small a rate drops nothing, but takes the code path of dropout.
        out = function(qkv, sequences, 1e-9 if function is cpu_ops.attention else 0.0)
        gradients.append(torch.autograd.grad((out * weight).sum(), qkv))
        results.append(out)

    tolerance = (
        {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    )
    for other, its_gradients in zip(results[1:], gradients[1:], strict=True):
        torch.testing.assert_close(other, results[0], **tolerance)
        for ours, theirs in zip(its_gradients, gradients[0], strict=True):
            assert torch.isfinite(theirs).all()
            torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("function", [attention.padded_sdpa, cpu_ops.attention])
def test_attention_dropout_drops_at_its_rate_and_scales_the_rest(function):
    """Check with one-hot values, whose output is the row of attention weights itself: each is 0 or
    its plain value / (1 - p).
    """
    torch.manual_seed(0)
    qkv, sequences = packed([8] * 400, heads=2)
    with torch.no_grad():
        qkv[:, :, 2] = torch.eye(8).repeat(400, 1)[:, None, :]

    plain_weights = attention.padded_sdpa(qkv, sequences, 0.0)
    dropped_weights = function(qkv, sequences, 0.25)
    gone = dropped_weights == 0
    assert abs(gone.float().mean().item() - 0.25) < 0.01
    torch.testing.assert_close(dropped_weights[~gone], plain_weights[~gone] / 0.75)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 400_001), (torch.bfloat16, 300_002), (torch.float64, 300_003)],
)
def test_the_mask_of_a_cpu(dtype, size):
    """Check rate, scale, the gradient's mask, independence of neighbours that share a draw and of
    calls, and replay by the seed.
    """
    torch.manual_seed(0)
    x = torch.ones(size, dtype=dtype, requires_grad=True)
    out = cpu_ops.dropout(x, 0.1)
    gone = out == 0
    assert abs(gone.double().mean().item() - 0.1) < 0.002
    assert out[~gone].unique().double().item() == pytest.approx(
        1 / 0.9, rel=1e-4 if dtype != torch.bfloat16 else 1e-2
    )
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out.detach())
    for distance in (1, 2, 3, 4):
        together = (gone[:-distance] & gone[distance:]).double().mean().item()
        assert abs(together - 0.01) < 0.001, distance

    assert not torch.equal(cpu_ops.dropout(x, 0.1), out)
    torch.manual_seed(0)
    assert torch.equal(cpu_ops.dropout(x, 0.1), out)


def test_no_dropout_and_nothing_but_dropout():
    x = torch.randn(3, 5)
    assert cpu_ops.dropout(x, 0.0) is x
    assert torch.equal(cpu_ops.dropout(x, 1.0), torch.zeros(3, 5))
    assert cpu_ops.dropout(x[:0], 0.5).shape == (0, 5)


def test_dropout_of_a_cpu_before_the_norm():
    """Compare with dropout by a known mask, followed by the norm."""
    x = torch.randn(6, 8)
    bias = torch.randn(8)
    residual = torch.randn(6, 8)
    gain = torch.randn(8)
    shift = torch.randn(8)

    def mask():
        torch.manual_seed(4)
        return cpu_ops.dropout(torch.ones(6, 8), 0.4)

    kept = mask()
    torch.manual_seed(4)
    expected = torch.nn.functional.layer_norm(residual + (x + bias) * kept, (8,), gain, shift)
    torch.testing.assert_close(
        cpu_ops.dropout_add_norm(x, bias, residual, gain, shift, 0.4, 1e-5), expected
    )


def test_attention_of_a_cpu_keeps_its_mask_in_the_backward_pass():
    """Check by finite differences in float64, with the same draw each time."""
    qkv, sequences = packed([3, 1, 5], 2, 4, torch.float64)

    def attend(x):
        torch.manual_seed(3)
        return cpu_ops.attention(x, sequences, 0.4)

    assert torch.autograd.gradcheck(attend, (qkv,))


def test_gather_rows_has_the_gradient_of_indexing():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    weight = torch.randn(6, 4, dtype=torch.float64)
    (ours,) = torch.autograd.grad((gather_rows(x, order, order.argsort()) * weight).sum(), x)
    (theirs,) = torch.autograd.grad((x[order] * weight).sum(), x)
    assert torch.equal(ours, theirs)


def test_deterministic_switches_of_torch():
    """Check in a process of its own, since the switches affect all of it."""
    code = """
from megatron_interbert.machines.host import same_bits_every_time
import os, torch
same_bits_every_time()
assert torch.are_deterministic_algorithms_enabled()
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
assert not torch.backends.cuda.mem_efficient_sdp_enabled()
assert not torch.backends.cuda.cudnn_sdp_enabled()
index = torch.zeros(4, dtype=torch.int64)
try:
    torch.ones(4).put_(index, torch.ones(4), accumulate=False)
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "does not have a deterministic implementation" in result.stdout, (
        "torch refuses what is not"
    )
