"""The Triton kernels against their plain twins in Triton's CPU interpreter: TRITON_INTERPRET=1 pytest tests/kernels/interpreted.py.

test_triton.py runs it so. Inputs are new each time; a failure prints the seed.
"""

import dataclasses
import random

import pytest
import torch
import torch.distributed as dist

from megatron_interbert.data.packing import pack
from megatron_interbert.kernels import plain, triton_ops, triton_vocab
from megatron_interbert.kernels.choice import Kernels, choose_kernels
from megatron_interbert.kernels.triton_attention import _ShortAttention, short_attention
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import partition_dimension
from megatron_interbert.model.transformer import TransformerLayer
from megatron_interbert.parallel.placement import Placement
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining import PretrainingTask
from tests.dist import run_on_ranks
from tests.kernels.sequences import packed
from tests.model.test_model import SMALL, examples

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
    wide = [
        x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    outputs = ours(*inputs), twin(*wide)
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(outputs[0])
    gradients = [
        torch.autograd.grad((out * weight).sum(), [t for t in of if isinstance(t, torch.Tensor) and t.requires_grad])
        for out, of in zip(outputs, (inputs, wide), strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 48), (33, 300)])
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


def check_rate(dropped, whole, p):
    """Every element is gone or larger by 1 / (1 - p)."""
    gone = dropped == 0
    assert abs(gone.float().mean().item() - p) < 0.03
    torch.testing.assert_close(dropped[~gone], whole[~gone] / (1 - p))


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 48), (33, 96)])
def test_embeddings(rows, width):
    positions, types = torch.randint(5, (rows,)), torch.randint(2, (rows,))
    norm = (leaf(width), leaf(width))
    text = (leaf(rows, width), positions, types, leaf(5, width), leaf(2, width), *norm)
    image = (leaf(rows, width), torch.rand(rows, 5), leaf(width, 5), leaf(width), *norm)
    compare(KERNELS.embed_text, plain.embed_text, (*text, 0.0, 1e-12))
    compare(KERNELS.embed_image, plain.embed_image, (*image, 0.0, 1e-12))


@pytest.mark.parametrize("name", ["embed_text", "embed_image"])
def test_dropout_behind_the_norm(name):
    """Its rate, its scale, and the same mask for the gradient: by finite differences along a direction, whose mask is the seed's."""
    rows, width, p = 64, 64, 0.3
    rest = (
        (torch.randint(5, (rows,)), torch.randint(2, (rows,)), leaf(5, width), leaf(2, width))
        if name == "embed_text"
        else (torch.rand(rows, 5), leaf(width, 5), leaf(width))
    )
    x, norm = leaf(rows, width), (leaf(width), leaf(width))

    def out(x, p):
        torch.manual_seed(1)
        return getattr(KERNELS, name)(x, *rest, *norm, p, 1e-12)

    check_rate(out(x, p), out(x, 0.0), p)
    weight, direction, step = torch.randn(rows, width), torch.randn(rows, width), 1e-2
    (gradient,) = torch.autograd.grad((out(x, p) * weight).sum(), x)
    with torch.no_grad():
        slope = ((out(x + step * direction, p) - out(x - step * direction, p)) * weight).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("width", [8, 1500])
def test_regions_are_hidden_and_averaged(seed, width):
    ragged = random.Random(seed)
    counts = torch.tensor([1, *(ragged.randint(1, 9) for _ in range(4))])
    features = torch.randn(int(counts.sum()), width).half()
    summaries = torch.cat([torch.zeros(1, dtype=torch.int64), (counts + 1).cumsum(0)[:-1]])
    rows = torch.tensor([s + 1 + i for s, c in zip(summaries.tolist(), counts.tolist(), strict=True) for i in range(c)])
    hidden = torch.nonzero(torch.rand(len(features)) < 0.3).flatten()
    inputs = (features, hidden, counts, rows, summaries, torch.float32)
    torch.testing.assert_close(KERNELS.region_rows(*inputs), plain.region_rows(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "words"), [(1, 128, 128), (5, 256, 250), (3, 128, 1), (4, 128, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_passes_of_cross_entropy(rows, columns, words, dtype, monkeypatch):
    monkeypatch.setattr(triton_vocab, "BLOCK", 64)
    logits, labels = (torch.randn(rows, columns) * 10).to(dtype), torch.randint(-20, columns + 20, (rows,))
    if words > 100:
        logits[0, 90] = logits[0, 7] = 99.0  # a tie
    found = KERNELS.vocab_statistics(logits, labels, words)
    expected = plain.vocab_statistics(logits, labels, words)
    for ours, twin in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, twin)
    normaliser, grad = expected[1].clamp(min=1e-30).log() + expected[0].clamp(min=-99), torch.randn(rows)
    twin = plain.vocab_gradient(logits.clone(), labels, normaliser, grad, words)
    torch.testing.assert_close(KERNELS.vocab_gradient(logits.clone(), labels, normaliser, grad, words), twin)


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
    layer = TransformerLayer(32, 2, 64, 0.2, 0.3, 1e-12, Placement(), KERNELS, streams)
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


def check_whole_model(ranks, dropout):
    """Losses and gradients of all kernels together are those of the twins; with dropout, alike on the ranks of a tensor-parallel group
    where they must be."""
    state = ParallelState(ranks)
    sizes = dataclasses.replace(SMALL, interaction_layers=1, image_layers=1)  # the interpreter takes its time
    sizes = sizes if dropout else sizes.without_dropout()
    batch, results = pack(examples(2), sizes.feature_dim), []
    for kernels in (KERNELS,) if dropout else (KERNELS, Kernels()):
        streams = RandomStreams(5, state.data_rank, state.tensor_rank)
        model = InterBert(sizes, state=state, kernels=kernels, streams=streams)
        initialise(model, sizes, 3, state)
        streams.start_step(1)
        loss, report = PretrainingTask().loss(model(batch), batch, batch.target_counts())
        loss.backward()
        results.append([loss.detach(), report, *(p.grad for p in model.parameters())])
    for ours, twin in zip(results[0], results[-1], strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-5)
    assert loss.isfinite()
    if ranks > 1:
        for name, parameter in model.named_parameters():
            if partition_dimension(name) is None:
                everywhere = [torch.empty_like(parameter) for _ in range(ranks)]
                dist.all_gather(everywhere, parameter.grad)
                assert torch.equal(*everywhere), name


@pytest.mark.parametrize("dropout", [False, True])
def test_the_whole_model(dropout):
    check_whole_model(1, dropout)


def check_on_two_ranks():
    check_whole_model(2, dropout=False)
    check_whole_model(2, dropout=True)


def test_the_whole_model_on_two_tensor_parallel_ranks():
    run_on_ranks(2, check_on_two_ranks)
