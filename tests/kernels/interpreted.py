"""Test the Triton kernels against float64 in Triton's CPU interpreter: TRITON_INTERPRET=1 pytest
tests/kernels/interpreted.py.

test_triton.py runs this. Inputs are random; a failure prints the seed.
"""

import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from megatron_interbert.data.packing import pack
from megatron_interbert.kernels import plain, triton_embedding, triton_ops, triton_vocab
from megatron_interbert.kernels.choice import Kernels, choose_kernels
from megatron_interbert.kernels.sequences import Sequences
from megatron_interbert.kernels.triton_attention import _Attention, packed_attention
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import partition_dimension
from megatron_interbert.model.transformer import Mlp, TransformerLayer
from megatron_interbert.parallel.placement import Placement
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from tests.dist import run_on_ranks
from tests.kernels import comparisons
from tests.kernels.sequences import packed
from tests.model.test_model import SMALL, examples

KERNELS = choose_kernels("triton", torch.device("cpu"))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def of_each_type(*cases):
    """Return [(dtype, case)]: all cases in float32, the first in float16, the last in bfloat16.

    Each takes seconds in the interpreter. On a GPU tests/gpu try all dtypes, at larger sizes.
    """
    in_16_bits = zip(DTYPES[1:], (cases[0], cases[-1]), strict=True)
    return [*((DTYPES[0], case) for case in cases), *in_16_bits]


@pytest.fixture(autouse=True)
def seed():
    number = random.SystemRandom().randrange(2**31)
    print(f"torch.manual_seed({number})")
    torch.manual_seed(number)
    return number


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """Widen bfloat16 products to float32: Triton's interpreter keeps bfloat16 as raw bits and would
    multiply them as integers.
    """
    products = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return products(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize(("dtype", "sizes"), of_each_type((1, 8), (33, 96), (7, 48)))
def test_elementwise_parts(dtype, sizes):
    rows, width = sizes
    comparisons.check_bias_gelu(KERNELS, rows, 3 * width, dtype, "cpu")
    comparisons.check_dropout_add_norm(KERNELS, rows, width, dtype, "cpu")
    comparisons.check_embeddings(KERNELS, rows, width, dtype, "cpu")


def test_several_rows_for_each_program(monkeypatch):
    monkeypatch.setattr(triton_ops, "MAX_PROGRAMS", 4)
    monkeypatch.setattr(triton_embedding, "MAX_PROGRAMS", 3)
    comparisons.check_bias_gelu(KERNELS, 70, 16, torch.float32, "cpu")
    comparisons.check_dropout_add_norm(KERNELS, 11, 16, torch.float32, "cpu")
    comparisons.check_embeddings(KERNELS, 11, 16, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 1500])
def test_regions_are_hidden_and_averaged(seed, width, dtype):
    ragged = random.Random(seed)
    counts = [1, *(ragged.randint(1, 9) for _ in range(4))]
    comparisons.check_region_rows(KERNELS, counts, width, dtype, "cpu")


@pytest.mark.parametrize(
    ("rows", "columns", "words"), [(1, 128, 128), (5, 256, 250), (3, 128, 1), (4, 128, 0)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_passes_of_cross_entropy(rows, columns, words, dtype, monkeypatch):
    monkeypatch.setattr(triton_vocab, "BLOCK", 64)
    comparisons.check_vocabulary(KERNELS, rows, columns, words, dtype, "cpu")


@pytest.mark.parametrize(("dtype", "width"), of_each_type(8, 64, 96))
def test_attention_of_ragged_lengths(dtype, width):
    for lengths in ([1], [5], [4, 0, 2], [0, 3], [37, 1, 64], [93, 0, 33]):
        comparisons.check_attention(packed_attention, lengths, 2, width, dtype, "cpu")
    comparisons.check_attention(packed_attention, [161, 1, 128, 17], 1, width, dtype, "cpu")


@pytest.mark.parametrize(
    ("dtype", "case"),
    of_each_type(([16] * 12, 8), ([93, 7, 70], 96), ([161, 5], 64), ([37, 64, 1, 23], 64)),
)
def test_attention_dropout(dtype, case):
    lengths, width = case
    heads = 1 if max(lengths) > 128 else 2
    comparisons.check_attention_dropout(packed_attention, lengths, heads, width, dtype, "cpu")


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_a_mask_is_the_same_whatever_the_tile(tile):
    """Compare tiles with whole rows on 40 tokens: they are the same operation."""
    qkv, sequences = packed([40, 3, 29], 2, 16)
    weight = torch.randn(72, 2, 16)
    results = []
    for size in (tile, 64):
        out = _Attention.apply(qkv, sequences, 0.4, 11, size)
        results.append([out, *torch.autograd.grad(out, qkv, weight)])

    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_gradients_by_finite_differences(p, tile):
    """Check in float64 with a fixed dropout mask: whole rows, and tiles, one of them not full."""
    qkv, sequences = packed([3, 1, 20], 2, 4, torch.float64)

    def attend(x):
        return _Attention.apply(x, sequences, p, 11, tile)

    assert torch.autograd.gradcheck(attend, (qkv,), fast_mode=True, atol=1e-4)


def test_wide_heads_go_to_padded_attention(monkeypatch):
    def refused(*args):
        raise AssertionError("no tile holds heads of 136")

    monkeypatch.setattr(_Attention, "apply", refused)
    inputs = (*packed([3, 2], 1, 136), 0.0)
    comparisons.compare(packed_attention, plain.attention, inputs, ("qkv",), torch.float32)


def test_nothing_to_attend_to():
    qkv, sequences = packed([0, 0], 2, 8)
    assert packed_attention(qkv, sequences, 0.3).shape == (0, 2, 8)


def test_recomputation_replays_every_mask():
    """Check that a layer with all dropouts gives the same bits when it is recomputed."""
    streams = RandomStreams(3)
    mlp = Mlp(32, 64, Placement(), KERNELS)
    layer = TransformerLayer(32, 2, mlp, 0.2, 0.3, 1e-12, Placement(), KERNELS, streams)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    sequences = Sequences(torch.tensor([0, 5, 9], dtype=torch.int32), 5)
    results = []
    x = torch.randn(9, 32)

    for run in (layer, lambda *inputs: streams.recompute(layer, *inputs)):
        streams.start_step(1)
        inputs = x.clone().requires_grad_()
        out, _ = run(inputs, sequences)
        gradients = torch.autograd.grad(out.square().sum(), [inputs, *layer.parameters()])
        results.append([out, *gradients])

    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def check_whole_model(ranks, dropout):
    """Check losses and gradients of all kernels together against the twins; and that gradients of
    replicated parameters are equal on all tensor-parallel ranks, with dropout too.
    """
    state = ParallelState(ranks)
    # the interpreter is slow
    sizes = dataclasses.replace(SMALL, interaction_layers=1, image_layers=1)
    sizes = sizes if dropout else sizes.without_dropout()
    batch = pack(examples(2), sizes.feature_dim)
    results = []

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
