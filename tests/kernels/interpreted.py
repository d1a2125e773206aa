"""The Triton kernels against their plain twins in Triton's CPU interpreter: TRITON_INTERPRET=1 pytest tests/kernels/interpreted.py.

test_triton.py runs it so. Inputs are new each time; a failure prints the seed.
"""

import random

import pytest
import torch

from megatron_interbert.kernels import plain, triton_ops
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.kernels.triton_attention import _ShortAttention, short_attention
from megatron_interbert.model.transformer import TransformerLayer
from megatron_interbert.parallel.rng import RandomStreams
from tests.kernels.sequences import packed

KERNELS = choose_kernels("triton", torch.device("cpu"))


@pytest.fixture(autouse=True)
def seed():
    number = random.SystemRandom().randrange(2**31)
    print(f"torch.manual_seed({number})")
    torch.manual_seed(number)
    return number


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def compare(ours, twin, inputs):
    """Values and gradients; the twin computes in float64."""
    wide = [x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    outputs = ours(*inputs), twin(*wide)
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(outputs[0])
    gradients = [
        torch.autograd.grad((out * weight).sum(), [t for t in of if isinstance(t, torch.Tensor) and t.requires_grad])
        for out, of in zip(outputs, (inputs, wide), strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 48), (33, 96)])
def test_elementwise_parts(rows, width):
    compare(KERNELS.bias_gelu, plain.bias_gelu, (leaf(rows, width), leaf(width)))
    inputs = (leaf(rows, width), leaf(width), leaf(rows, width), leaf(width), leaf(width), 0.0, 1e-12)
    compare(KERNELS.dropout_add_norm, plain.dropout_add_norm, inputs)


def test_several_rows_for_each_program(monkeypatch):
    monkeypatch.setattr(triton_ops, "MAX_PROGRAMS", 4)
    inputs = (leaf(11, 16), leaf(16), leaf(11, 16), leaf(16), leaf(16), 0.0, 1e-12)
    compare(KERNELS.dropout_add_norm, plain.dropout_add_norm, inputs)


def test_dropout_before_the_norm():
    """Rate, and a backward mask equal to the forward one. With gain 1 and a zero residual the mask shows in the output."""
    rows, width, p = 64, 64, 0.3
    x, zero = torch.ones(rows, width, requires_grad=True), torch.zeros(width)
    residual = torch.zeros(rows, width, requires_grad=True)
    out = KERNELS.dropout_add_norm(x, zero, residual, torch.ones(width), zero, p, 1e-12)
    dropped = out < 0
    assert abs(float(dropped.float().mean()) - p) < 0.04, float(dropped.float().mean())
    weight = torch.randn(rows, width)
    dx, dresidual = torch.autograd.grad((out * weight).sum(), (x, residual))
    torch.testing.assert_close(dx, torch.where(dropped, 0.0, dresidual / (1 - p)))


@pytest.mark.parametrize("width", [8, 64, 96])
def test_attention_of_ragged_lengths(seed, width):
    ragged = random.Random(seed)
    for lengths in ([1], [5], [4, 0, 2], [0, 3], [128, 1, 17], [ragged.randint(1, 128) for _ in range(4)]):
        qkv, offsets = packed(lengths, 2, width)
        compare(short_attention, plain.attention, (*qkv, offsets, max(lengths), 0.0))


def test_longer_sequences_go_to_padded_attention():
    qkv, offsets = packed([130, 2], 1, 8)
    compare(short_attention, plain.attention, (*qkv, offsets, 130, 0.0))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_gradients_by_finite_differences(p):
    """In float64, with a dropout mask that stays the same."""
    qkv, offsets = packed([3, 1, 5], 2, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: _ShortAttention.apply(q, k, v, offsets, 5, p, 11), qkv, fast_mode=True)


def test_attention_dropout_drops_at_its_rate_and_scales_the_rest():
    """With one-hot values an output is the row of weights itself."""
    (q, k, _), offsets = packed([16] * 50, 2, 16)
    v = torch.eye(16).repeat(50, 1)[:, None, :].expand(-1, 2, -1).contiguous()
    whole, dropped = short_attention(q, k, v, offsets, 16, 0.0), short_attention(q, k, v, offsets, 16, 0.25)
    gone = dropped == 0
    share = gone.float().view(50, 16, 2, 16)
    assert abs(share.mean().item() - 0.25) < 0.02
    assert share.mean(dim=(1, 3)).std() > 0.01, "sequences and heads have masks of their own"
    torch.testing.assert_close(dropped[~gone], whole[~gone] / 0.75)


def test_recomputation_replays_every_mask():
    """A layer with all dropouts, plain and with its activations recomputed: the same bits."""
    streams = RandomStreams(3)
    layer = TransformerLayer(32, 2, 64, 0.2, 0.3, 1e-12, None, KERNELS, streams)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    offsets, results = torch.tensor([0, 5, 9], dtype=torch.int32), []
    x = torch.randn(9, 32)
    for run in (layer, lambda *inputs: streams.recompute(layer, *inputs)):
        streams.start_step(1)
        inputs = x.clone().requires_grad_()
        out = run(inputs, offsets, 5)
        gradients = torch.autograd.grad(out.square().sum(), [inputs, *layer.parameters()])
        results.append([out, *gradients])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
