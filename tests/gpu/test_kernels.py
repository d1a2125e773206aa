"""Test kernels on a real GPU against float64, with the comparisons that tests/kernels also makes in
Triton's interpreter. Skipped without a CUDA device.
"""

import pytest
import torch

from megatron_interbert.data.packing import pack
from megatron_interbert.kernels import attention
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.kernels.fit import gpu_of
from megatron_interbert.kernels.products import Float8Products, quantise
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.virtual.samples import random_examples
from tests.kernels import comparisons

triton_attention = pytest.importorskip(
    "megatron_interbert.kernels.triton_attention",
    reason="triton is not installed (pip install -r requirements.txt)",
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [[1], [37, 1, 64, 0, 23], [93, 128, 5], [161, 37, 200, 1]]
HEADS = [(12, 64), (8, 96)]  # (number of heads, their size) in the base model


@pytest.fixture(scope="module")
def kernels():
    return choose_kernels("triton", torch.device("cuda"), attention_dropout=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), HEADS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention(kernels, lengths, heads, width, dtype):
    """Check Triton's, flash and padded attention: values and gradients."""
    for attend in (kernels.attention, triton_attention.flash_attention, attention.padded_sdpa):
        comparisons.check_attention(attend, lengths, heads, width, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), HEADS)
@pytest.mark.parametrize("lengths", LENGTHS[1:], ids=str)
def test_attention_dropout(kernels, lengths, heads, width, dtype):
    """Check the rate, and that values and gradients use the same mask."""
    comparisons.check_attention_dropout(kernels.attention, lengths, heads, width, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 768), (1000, 768), (5000, 1024)])
def test_elementwise_parts_and_embeddings(kernels, rows, width, dtype):
    comparisons.check_bias_gelu(kernels, rows, 4 * width, dtype, "cuda")
    comparisons.check_dropout_add_norm(kernels, rows, width, dtype, "cuda")
    comparisons.check_embeddings(kernels, rows, width, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_regions_are_hidden_and_averaged(kernels, dtype):
    comparisons.check_region_rows(kernels, [1, 36, 10, 100], 2048, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "words"), [(300, 30592, 30522), (5, 256, 250), (3, 128, 0)]
)
def test_the_passes_of_cross_entropy(kernels, rows, columns, words, dtype):
    comparisons.check_vocabulary(kernels, rows, columns, words, dtype, "cuda")


def test_every_kernel_stays_within_this_card(kernels):
    """Check that what was compiled above fits in this GPU's shared memory."""
    limit = gpu_of(torch.device("cuda")).shared_memory

    for name in ("_row_forward", "_row_backward", "_tiled_forward", "_tiled_backward"):
        compiled = [
            one
            for cache, *_ in getattr(triton_attention, name).device_caches.values()
            for one in cache.values()
        ]
        assert compiled, f"{name} was not launched"
        assert max(one.metadata.shared for one in compiled) <= limit, name


def test_deterministic_passes_give_the_same_bits():
    """Run forward and backward passes twice with the kernels of --deterministic."""
    kernels = choose_kernels(
        "auto", torch.device("cuda"), attention_dropout=True, deterministic=True
    )
    sizes = PRESETS["base"]
    model = InterBert(sizes, kernels=kernels)
    initialise(model, sizes, 0, ParallelState())
    model = model.to("cuda", torch.bfloat16).train()
    batch = pack(random_examples(sizes, 16, (8, 20), (10, 36)), sizes.feature_dim).to(
        torch.device("cuda")
    )
    results = []

    for _ in range(2):
        torch.manual_seed(1)
        loss, _ = PretrainingTask().loss(model(batch), batch, batch.target_counts().cuda())
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])

    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="no 8-bit products here",
)
@pytest.mark.parametrize("tokens", [0, 1, 37, 1000])
def test_products_in_8_bits_equal_those_of_the_cpu(tokens):
    x, weight, bias, grad = (
        torch.randn(*shape).bfloat16()
        for shape in ((tokens, 768), (3072, 768), (3072,), (tokens, 3072))
    )
    if tokens:
        assert all(
            torch.equal(a.cpu().float(), b.float())
            for a, b in zip(quantise(x.cuda()), quantise(x), strict=True)
        )

    results = []
    for device in ("cpu", "cuda"):
        leaves = [leaf.to(device).requires_grad_() for leaf in (x, weight, bias)]
        y = Float8Products.linear(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(device))])

    for theirs, ours in zip(*results, strict=True):
        largest = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0.02, atol=0.02 * largest)
