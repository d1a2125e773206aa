"""Compute operations with dropout as a CPU does fastest; rates are rounded to 1/65,536.

A mask of 1.3 M elements takes 0.9 ms on two cores, torch's own 8 to 12 ms. All else is as in
`plain`.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron_interbert.kernels.attention import padded_sdpa
from megatron_interbert.kernels.sequences import Sequences, padded_places

LEVELS = 1 << 16


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Compute F.dropout with a mask of `dropout_mask`."""
    return x if round(p * LEVELS) == 0 else x * dropout_mask(x, p)


def dropout_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """Return the factors by which dropout multiplies x: 0 or 1 / (1 - p)."""
    dropped = round(p * LEVELS)
    if dropped == LEVELS:
        return torch.zeros_like(x)

    bits = _random_bits(x.numel()).view(x.shape)
    kept = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(bits, dropped - LEVELS // 2, out=kept)  # an intermediate bool tensor would take longer

    return kept.mul_(LEVELS / (LEVELS - dropped))


def _random_bits(count: int) -> torch.Tensor:
    """Return `count` random int16, four from each draw of NumPy's SFC64.

    SFC64 takes half the time of torch's own generator, from which it is seeded, so masks repeat if
    torch's generator is set back.
    """
    seed = torch.empty(1, dtype=torch.int64).random_().numpy()
    draws = np.random.SFC64(seed).random_raw(-(-count // 4))

    return torch.from_numpy(draws.view(np.int16))[:count]


def dropout_add_norm(
    x: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    dropout_p: float,
    eps: float,
) -> torch.Tensor:
    """See plain.dropout_add_norm."""
    total = _residual_sum(x + bias, residual, dropout_p)
    return F.layer_norm(total, weight.shape, weight, norm_bias, eps)


def _residual_sum(x: torch.Tensor, residual: torch.Tensor, p: float) -> torch.Tensor:
    """Return residual + dropout(x), in one pass over both."""
    if round(p * LEVELS) == 0:
        return residual + x

    return torch.addcmul(residual, x, dropout_mask(x, p))


def attention(qkv: torch.Tensor, sequences: Sequences, dropout_p: float) -> torch.Tensor:
    """See plain.attention; padded_sdpa without gradient and dropout, else with whole score
    matrices.

    In bfloat16 torch's SDPA with its gradient takes 3 to 4 times as long (measured without AMX).
    """
    if len(qkv) == 0 or (dropout_p == 0 and not (qkv.requires_grad and torch.is_grad_enabled())):
        return padded_sdpa(qkv, sequences, dropout_p)

    return _TrainedAttention.apply(qkv, sequences, dropout_p)


class _TrainedAttention(torch.autograd.Function):
    """Compute attention and its gradient, head by head over padded sequences.

    Each row of D numbers goes straight from the packed tokens to its place in [3, B heads, L, D]
    and back: no copy is made just to permute axes, and the gradients of queries, keys and values
    are written into one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, sequences: Sequences, dropout_p: float
    ) -> torch.Tensor:
        """Save the padded rows, the softmax, the dropout mask, and where the rows came from."""
        tokens, heads, _three, size = qkv.shape
        there, back_of_result, back = sequences.once(_row_numbers, tokens, heads)
        hidden = sequences.once(_score_bias, tokens, heads, qkv.dtype)

        padded = qkv.reshape(-1, size).index_select(0, there)
        padded = padded.view(3, len(sequences) * heads, sequences.longest, size)
        queries, keys, values = padded
        scores = torch.baddbmm(hidden, queries, keys.transpose(1, 2), alpha=size**-0.5)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        weights = scores.to(wide).softmax(dim=-1).to(qkv.dtype)  # torch is slower in 16 bits
        kept = dropout_mask(weights, dropout_p) if dropout_p > 0 else None
        attended = torch.bmm(weights if kept is None else weights * kept, values)

        ctx.save_for_backward(padded, weights, kept, back_of_result, back)

        return attended.view(-1, size).index_select(0, back_of_result).view(tokens, heads, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return one gradient for queries, keys and values."""
        padded, weights, kept, back_of_result, back = ctx.saved_tensors
        queries, keys, values = padded
        tokens, heads, size = grad.shape
        padded_grad = torch.zeros_like(queries)
        padded_grad.view(-1, size).index_copy_(0, back_of_result, grad.reshape(-1, size))

        gradients = torch.empty_like(padded)
        of_queries, of_keys, of_values = gradients
        used = weights if kept is None else weights * kept
        torch.bmm(used.transpose(1, 2), padded_grad, out=of_values)
        of_weights = torch.bmm(padded_grad, values.transpose(1, 2))
        if kept is not None:
            of_weights.mul_(kept)

        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(
            size**-0.5
        )
        torch.bmm(of_scores, keys, out=of_queries)
        torch.bmm(of_scores.transpose(1, 2), queries, out=of_keys)

        return (
            gradients.view(-1, size).index_select(0, back).view(tokens, heads, 3, size),
            None,
            None,
        )


def _row_numbers(
    sequences: Sequences, tokens: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the row numbers that move rows of D numbers between packed and padded order.

    The packed row [N, heads, 3] of each place [3, B, heads, L]; the place [B, heads, L] of each
    result row [N, heads]; and the place [3, B, heads, L] of each packed row [N, heads, 3].
    """
    rows, slots, _seen = sequences.once(padded_places, tokens)
    head = torch.arange(heads)
    part = torch.arange(3)
    length = sequences.longest

    there = (rows.view(-1, 1, length) * heads + head[:, None]) * 3 + part[:, None, None, None]
    sample = torch.div(slots, length, rounding_mode="floor")
    of_result = (sample * (heads - 1) * length + slots)[:, None] + head * length
    back = of_result[:, :, None] + part * (len(rows) * heads)

    return there.flatten(), of_result.flatten(), back.flatten()


def _score_bias(sequences: Sequences, tokens: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to the scores [B heads, 1, L]: 0, or -inf at padding."""
    _rows, _slots, seen = sequences.once(padded_places, tokens)
    bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))

    return bias[:, None, None, :].expand(-1, heads, -1, -1).reshape(-1, 1, sequences.longest)
