"""Compare every fused kernel with its twin in float64: on a GPU for tests/gpu, in Triton's
interpreter for tests/kernels/interpreted.py.

Inputs are rounded to the dtype under test first, so that only the kernel's own errors count.
Dropout is not taken on trust: the mask is read off the results for chosen inputs, checked against
its rate, and given to the twin, which must then agree in values and gradients.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from megatron_interbert.kernels import plain
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.kernels.sequences import Sequences
from tests.kernels.sequences import packed

Attention = Callable[[torch.Tensor, Sequences, float], torch.Tensor]

SEED = 7


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest accepted |ours - exact| / |exact| (vector norms): a few roundings of the
    dtype, with sums in float32.
    """
    return {torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3, torch.float32: 1e-5}[dtype]


def assert_near(ours: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Check the tensor's relative error against the tolerance, and each element's error, relative
    to the largest element, against eight times the tolerance.
    """
    assert ours.shape == exact.shape, what
    if not ours.numel():
        return

    wrong = ours.double() - exact
    error = float(wrong.norm() / exact.norm().clamp(min=1e-12))
    worst = float(wrong.abs().max() / exact.abs().max().clamp(min=1e-12))
    assert error <= tolerance(dtype), f"{what}: off by {error:.2e} in {dtype}"
    assert worst <= 8 * tolerance(dtype), (
        f"{what}: one element is off by {worst:.2e} of the largest, in {dtype}"
    )


def compare(
    ours: Callable, twin: Callable, inputs: Sequence[Any], names: Sequence[str], dtype: torch.dtype
) -> None:
    """Compare values and gradients of ours(*inputs) with those of twin(*inputs in float64).

    `names` are those of the inputs that require a gradient, in order.
    """
    wide = [_widened(x) for x in inputs]
    results = ours(*inputs), twin(*wide)
    assert_near(results[0].detach(), results[1].detach(), dtype, "result")

    weight = torch.randn_like(results[0])
    gradients = []
    for result, given in zip(results, (inputs, wide), strict=True):
        leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
        gradients.append(torch.autograd.grad(result, leaves, weight.to(result.dtype)))

    for name, found, exact in zip(names, *gradients, strict=True):
        assert_near(found, exact, dtype, f"gradient of {name}")


def _widened(x: Any) -> Any:
    """Copy a floating-point tensor to float64; return anything else as it is."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def check_rate(kept: torch.Tensor, p: float) -> None:
    """Check the share that a mask [rows, columns] drops, and that neighbours are dropped
    independently, within five standard deviations.
    """
    gone = ~kept
    beside = gone[:, 1:] & gone[:, :-1]
    below = gone[1:] & gone[:-1]

    for found, expected in ((gone, p), (beside, p * p), (below, p * p)):
        if not found.numel():
            continue

        spread = (expected * (1 - expected) / found.numel()) ** 0.5
        share = float(found.double().mean())
        assert abs(share - expected) < 5 * spread + 1e-3, (
            f"{share} of {found.numel()} gone, not {expected}"
        )


# Attention


def check_attention(
    attention: Attention,
    lengths: list[int],
    heads: int,
    width: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Check values and gradients without dropout."""
    qkv, sequences = packed(lengths, heads, width, dtype, device)
    compare(attention, plain.attention, (qkv, sequences, 0.0), ("qkv",), dtype)


def check_attention_dropout(
    attention: Attention,
    lengths: list[int],
    heads: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    p: float = 0.3,
) -> None:
    """Check the mask's rate, values and gradients with that mask, and that seeds change it."""
    qkv, sequences = packed(lengths, heads, width, dtype, device)
    masks = attention_masks(attention, qkv, sequences, p, SEED)
    tokens = torch.cat([mask.flatten(1) for mask in masks], dim=1)
    check_rate(tokens, p)
    again = attention_masks(attention, qkv, sequences, p, SEED + 1)
    assert not all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))

    def ours(*inputs: Any) -> torch.Tensor:
        torch.manual_seed(SEED)
        return attention(*inputs)

    def twin(qkv: torch.Tensor, sequences: Sequences, p: float) -> torch.Tensor:
        return masked_attention(qkv, sequences, masks, p)

    compare(ours, twin, (qkv, sequences, p), ("qkv",), dtype)


def attention_masks(
    attention: Attention, qkv: torch.Tensor, sequences: Sequences, p: float, seed: int
) -> list[torch.Tensor]:
    """Return which of each sequence's weights dropout keeps: boolean [heads, L, L].

    With one-hot values the result is a row of weights itself. As values have only D columns, they
    show D keys at a time.
    """
    width = qkv.shape[-1]
    offsets = sequences.offsets
    place = torch.cat(
        [torch.arange(length, device=qkv.device) for length in offsets.diff().tolist()]
    )
    windows = []

    for start in range(0, sequences.longest, width):
        shown = qkv.detach().clone()
        shown[:, :, 2] = (place[:, None] - start == torch.arange(width, device=qkv.device))[
            :, None, :
        ].to(qkv.dtype)
        torch.manual_seed(seed)
        windows.append(attention(shown, sequences, p))

    kept = torch.cat(windows, dim=-1) != 0
    bounds = itertools.pairwise(offsets.tolist())

    return [kept[start:stop, :, : stop - start].transpose(0, 1) for start, stop in bounds]


def masked_attention(
    qkv: torch.Tensor, sequences: Sequences, masks: list[torch.Tensor], p: float
) -> torch.Tensor:
    """Attend as plain.attention does, with given dropout masks."""
    parts = []
    bounds = itertools.pairwise(sequences.offsets.tolist())
    for (start, stop), mask in zip(bounds, masks, strict=True):
        q, k, v = qkv[start:stop].permute(2, 1, 0, 3)
        weights = (q @ k.transpose(1, 2) * qkv.shape[-1] ** -0.5).softmax(dim=-1)
        parts.append((weights * mask / (1 - p) @ v).transpose(0, 1))

    return torch.cat(parts)


# Elementwise parts and embeddings


def check_bias_gelu(
    kernels: Kernels, rows: int, width: int, dtype: torch.dtype, device: str
) -> None:
    """Check GELU of x + bias."""
    x = _leaf(device, dtype, rows, width)
    bias = _leaf(device, dtype, width)
    compare(kernels.bias_gelu, plain.bias_gelu, (x, bias), ("x", "bias"), dtype)


def check_dropout_add_norm(
    kernels: Kernels, rows: int, width: int, dtype: torch.dtype, device: str
) -> None:
    """Check without dropout, and with the mask read off for x = 1 and all else 0, as the norm keeps
    the sign.
    """
    inputs = [
        _leaf(device, dtype, *shape)
        for shape in ((rows, width), (width,), (rows, width), (width,), (width,))
    ]
    names = ("x", "bias", "residual", "weight", "norm_bias")
    compare(kernels.dropout_add_norm, plain.dropout_add_norm, (*inputs, 0.0, 1e-12), names, dtype)

    p = 0.3
    nothing = torch.zeros_like(inputs[1])
    one = torch.ones_like(inputs[3])
    torch.manual_seed(SEED)
    shown = kernels.dropout_add_norm(
        torch.ones_like(inputs[0]), nothing, torch.zeros_like(inputs[2]), one, nothing, p, 1e-5
    )
    kept = shown.detach() > 0
    if width > 8:  # a row of which all or nothing is kept has no sign
        check_rate(kept, p)

    def ours(*inputs: Any) -> torch.Tensor:
        torch.manual_seed(SEED)
        return kernels.dropout_add_norm(*inputs)

    def twin(x, bias, residual, weight, norm_bias, p, eps):
        return F.layer_norm(
            residual + (x + bias) * kept / (1 - p), weight.shape, weight, norm_bias, eps
        )

    if width > 8:
        compare(ours, twin, (*inputs, p, 1e-12), names, dtype)


def check_embeddings(
    kernels: Kernels, rows: int, width: int, dtype: torch.dtype, device: str
) -> None:
    """Check text and region embeddings without dropout, and with the mask that zeros reveal."""
    positions, types = (torch.randint(most, (rows,), device=device) for most in (40, 2))
    places = torch.rand(rows, 5, device=device).to(dtype)
    norm = [_leaf(device, dtype, width) for _ in range(2)]
    words, position_table, type_table = (
        _leaf(device, dtype, count, width) for count in (rows, 40, 2)
    )
    text = (words, positions, types, position_table, type_table, *norm)
    image = (
        _leaf(device, dtype, rows, width),
        places,
        _leaf(device, dtype, width, 5),
        _leaf(device, dtype, width),
        *norm,
    )

    cases = (
        (
            kernels.embed_text,
            plain.embed_text,
            text,
            ("words", "positions", "types", "weight", "bias"),
        ),
        (
            kernels.embed_image,
            plain.embed_image,
            image,
            ("projected", "location weight", "location bias", "weight", "bias"),
        ),
    )
    for ours, twin, inputs, names in cases:
        compare(ours, twin, (*inputs, 0.0, 1e-12), names, dtype)
        _check_last_dropout(ours, twin, inputs, names, dtype)


def _check_last_dropout(
    ours: Callable, twin: Callable, inputs: Sequence[Any], names: Sequence[str], dtype: torch.dtype
) -> None:
    """Check the dropout of an operation that ends in it."""
    p = 0.3

    def with_seed(*inputs: Any) -> torch.Tensor:
        torch.manual_seed(SEED)
        return ours(*inputs)

    kept = with_seed(*inputs, p, 1e-12).detach() != 0
    check_rate(kept, p)

    def masked(*inputs: Any) -> torch.Tensor:
        *others, p, eps = inputs
        return twin(*others, 0.0, eps) * kept / (1 - p)

    compare(with_seed, masked, (*inputs, p, 1e-12), names, dtype)


def _leaf(device: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(device, dtype).requires_grad_()


# Regions and words


def check_region_rows(
    kernels: Kernels, counts: list[int], width: int, dtype: torch.dtype, device: str
) -> None:
    """Check that hidden regions are 0, and that each image's mean precedes its regions."""
    numbers = torch.tensor(counts, device=device)
    features = torch.randn(sum(counts), width).half().to(device)
    ends = (numbers + 1).cumsum(0)
    summaries = ends - numbers - 1
    rows = torch.cat(
        [torch.arange(int(end) - count, int(end)) for end, count in zip(ends, counts, strict=True)]
    ).to(device)
    hidden = torch.nonzero(torch.rand(len(features)) < 0.3).flatten().to(device)
    found = kernels.region_rows(features, hidden, numbers, rows, summaries, dtype)
    exact = plain.region_rows(features, hidden, numbers, rows, summaries, torch.float64)
    assert found.dtype == dtype
    assert_near(found, exact, dtype, "region rows")


def check_vocabulary(
    kernels: Kernels, rows: int, columns: int, words: int, dtype: torch.dtype, device: str
) -> None:
    """Check both passes of cross entropy, with labels of other ranks and a tie."""
    logits = (torch.randn(rows, columns) * 5).to(device, dtype)
    labels = torch.randint(-20, columns + 20, (rows,)).to(device)
    grad = torch.randn(rows).to(device)
    if words > 100:
        logits[0, 90] = logits[0, 7] = 99.0

    exact = plain.vocab_statistics(logits.double(), labels, words)
    found = kernels.vocab_statistics(logits, labels, words)
    assert torch.equal(found[3], exact[3]), "place of the largest"
    for name, ours, theirs in zip(("largest", "total", "own"), found, exact, strict=False):
        if words:
            assert_near(ours, theirs, torch.float32, name)

    normaliser = exact[1].clamp(min=1e-30).log() + exact[0].clamp(min=-99)
    expected = plain.vocab_gradient(logits.double(), labels, normaliser, grad.double(), words)
    ours = kernels.vocab_gradient(logits.clone(), labels, normaliser.float(), grad, words)
    assert_near(ours, expected, dtype, "gradient of the logits")
