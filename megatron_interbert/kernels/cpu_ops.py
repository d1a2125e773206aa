"""Operations with dropout as a CPU does them fastest: torch's own mask costs 8 ms for 600,000 elements on two cores, this one 2.

Rates are rounded to 1/65,536. Everything else is as in `plain`.
"""

from typing import Any

import torch
import torch.nn.functional as F

from megatron_interbert.kernels.attention import padded_places, padded_sdpa

LEVELS = 1 << 16


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """F.dropout with a mask of `dropout_mask`."""
    return x if round(p * LEVELS) == 0 else x * dropout_mask(x, p)


def dropout_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """What dropout multiplies x by, 0 or 1 / (1 - p): from 16 random bits an element, one draw of torch's generator serves four."""
    dropped = round(p * LEVELS)
    if dropped == LEVELS:
        return torch.zeros_like(x)

    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: x.numel()]
    kept = (bits >= dropped - LEVELS // 2).to(x.dtype).mul_(LEVELS / (LEVELS - dropped))
    return kept.view(x.shape)


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
    return F.layer_norm(residual + dropout(x + bias, dropout_p), weight.shape, weight, norm_bias, eps)


def attention(qkv: torch.Tensor, offsets: torch.Tensor, max_length: int, dropout_p: float) -> torch.Tensor:
    """See plain.attention: as padded_sdpa where no gradient is asked for, else with whole score matrices.

    In bfloat16 torch's SDPA with its gradient takes 3 to 4 times as long (measured without AMX).
    """
    if len(qkv) == 0 or (dropout_p == 0 and not (qkv.requires_grad and torch.is_grad_enabled())):
        return padded_sdpa(qkv, offsets, max_length, dropout_p)
    return _TrainedAttention.apply(qkv, offsets, max_length, dropout_p)


class _TrainedAttention(torch.autograd.Function):
    """Attention and its gradient, head by head over padded sequences.

    Each row of D numbers goes straight from the packed tokens to its place in [3, B heads, L, D] and back: no copy only turns axes
    around, and the gradients of queries, keys and values are written into one tensor.
    """

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, offsets: torch.Tensor, max_length: int, dropout_p: float) -> torch.Tensor:
        """Keeps the padded rows, the softmax, the mask of dropout, and where the rows of D came from."""
        tokens, heads, _three, size = qkv.shape
        samples = len(offsets) - 1
        rows, slots, seen = padded_places(offsets, max_length, tokens)
        there, back_of_result, back = _row_numbers(rows, slots, max_length, heads)

        padded = qkv.reshape(-1, size).index_select(0, there).view(3, samples * heads, max_length, size)
        queries, keys, values = padded
        hidden = torch.zeros(seen.shape, dtype=qkv.dtype).masked_fill_(~seen, float("-inf"))
        hidden = hidden[:, None, None, :].expand(-1, heads, -1, -1).reshape(samples * heads, 1, max_length)
        weights = torch.baddbmm(hidden, queries, keys.transpose(1, 2), alpha=size**-0.5).softmax(dim=-1)
        kept = dropout_mask(weights, dropout_p) if dropout_p > 0 else None
        attended = torch.bmm(weights if kept is None else weights * kept, values)

        ctx.save_for_backward(padded, weights, kept, back_of_result, back)
        return attended.view(-1, size).index_select(0, back_of_result).view(tokens, heads, size)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """One gradient for queries, keys and values."""
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
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(size**-0.5)
        torch.bmm(of_scores, keys, out=of_queries)
        torch.bmm(of_scores.transpose(1, 2), queries, out=of_keys)
        return gradients.view(-1, size).index_select(0, back).view(tokens, heads, 3, size), None, None, None


def _row_numbers(
    rows: torch.Tensor, slots: torch.Tensor, length: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of rows of D, from those of tokens by `padded_places`.

    Of packed [N, heads, 3] for each place in [3, B, heads, L]; of places in [B, heads, L] for each of [N, heads], and of places in
    [3, B, heads, L] for each of [N, heads, 3].
    """
    head, part = torch.arange(heads), torch.arange(3)
    there = (rows.view(-1, 1, length) * heads + head[:, None]) * 3 + part[:, None, None, None]
    sample = torch.div(slots, length, rounding_mode="floor")
    of_result = (sample * (heads - 1) * length + slots)[:, None] + head * length
    back = of_result[:, :, None] + part * (len(rows) * heads)
    return there.flatten(), of_result.flatten(), back.flatten()
