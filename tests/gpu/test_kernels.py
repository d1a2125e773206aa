"""Kernels on a real GPU against their plain twins. Skips where there is no CUDA device."""

import itertools

import pytest
import torch

from megatron_interbert.data.packing import pack
from megatron_interbert.kernels import attention, plain
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.kernels.products import Float8Products, quantise
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining import PretrainingTask
from tools.benchmarks.batches import random_examples

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

    def numbers(most):
        return torch.randint(most, (rows,), device="cuda")

    rows, width = 1000, 768
    places = torch.rand(rows, 5, device="cuda", dtype=dtype)
    cases = [
        (kernels.bias_gelu, plain.bias_gelu, (leaf(rows, 3072), leaf(3072))),
        (kernels.dropout_add_norm, plain.dropout_add_norm,
         (leaf(rows, width), leaf(width), leaf(rows, width), leaf(width), leaf(width), 0.0, 1e-12)),
        (kernels.embed_text, plain.embed_text,
         (leaf(rows, width), numbers(40), numbers(2), leaf(40, width), leaf(2, width), leaf(width), leaf(width), 0.0, 1e-12)),
        (kernels.embed_image, plain.embed_image,
         (leaf(rows, width), places, leaf(width, 5), leaf(width), leaf(width), leaf(width), 0.0, 1e-12)),
    ]  # fmt: skip
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.5}
    for ours, twin, inputs in cases:
        outputs = [function(*inputs) for function in (ours, twin)]
        torch.testing.assert_close(*outputs, **tolerance)
        weight = torch.randn_like(outputs[0])
        tensors = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
        for a, b in zip(*(torch.autograd.grad((o * weight).sum(), tensors) for o in outputs), strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_passes_of_cross_entropy_equal_their_twins(dtype):
    kernels = choose_kernels("triton", torch.device("cuda"))
    rows, columns, words = 300, 30592, 30522
    logits = (torch.randn(rows, columns, device="cuda") * 5).to(dtype)
    labels, grad = torch.randint(words, (rows,), device="cuda"), torch.randn(rows, device="cuda")
    expected = plain.vocab_statistics(logits, labels, words)
    for ours, twin in zip(kernels.vocab_statistics(logits, labels, words), expected, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)
    normaliser = expected[1].log() + expected[0]
    twin = plain.vocab_gradient(logits.clone(), labels, normaliser, grad, words)
    torch.testing.assert_close(kernels.vocab_gradient(logits, labels, normaliser, grad, words), twin, rtol=0.02, atol=1e-4)


def test_deterministic_passes_give_the_same_bits():
    """All kernels chosen with --deterministic, forward and backward, twice."""
    kernels = choose_kernels("auto", torch.device("cuda"), attention_dropout=True, deterministic=True)
    sizes = PRESETS["base"]
    model = InterBert(sizes, kernels=kernels)
    initialise(model, sizes, 0, ParallelState())
    model = model.to("cuda", torch.bfloat16).train()
    batch = pack(random_examples(sizes, 16, (8, 20), (10, 36)), sizes.feature_dim).to(torch.device("cuda"))
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        loss, _ = PretrainingTask().loss(model(batch), batch, batch.target_counts().cuda())
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no 8-bit products here")
@pytest.mark.parametrize("tokens", [0, 1, 37, 1000])
def test_products_in_8_bits_equal_those_of_the_cpu(tokens):
    x, weight, bias, grad = (torch.randn(*shape).bfloat16() for shape in ((tokens, 768), (3072, 768), (3072,), (tokens, 3072)))
    if tokens:
        assert all(torch.equal(a.cpu().float(), b.float()) for a, b in zip(quantise(x.cuda()), quantise(x), strict=True))
    results = []
    for device in ("cpu", "cuda"):
        leaves = [leaf.to(device).requires_grad_() for leaf in (x, weight, bias)]
        y = Float8Products.linear(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(device))])
    for theirs, ours in zip(*results, strict=True):
        largest = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0.02, atol=0.02 * largest)
