"""Operations with dropout as a CPU does them fastest: torch's own mask costs 8 ms for 600,000 elements on two cores, this one 2.

Rates are rounded to 1/65,536. Everything else is as in `plain`, gradients are autograd's.
"""

import torch
import torch.nn.functional as F

from megatron_interbert.kernels.attention import padded_places, padded_sdpa
from megatron_interbert.kernels.gather import gather_rows

LEVELS = 1 << 16


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """F.dropout with a mask from 16 random bits an element: one draw of torch's CPU generator serves four."""
    dropped = round(p * LEVELS)
    if dropped == 0:
        return x
    if dropped == LEVELS:
        return x * 0.0
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: x.numel()]
    kept = (bits >= dropped - LEVELS // 2).to(x.dtype).mul_(LEVELS / (LEVELS - dropped))
    return x * kept.view(x.shape)


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


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_length: int, dropout_p: float
) -> torch.Tensor:
    """See plain.attention: as padded_sdpa, which without dropout does all of it, with whole score matrices where there is dropout."""
    if dropout_p == 0:
        return padded_sdpa(q, k, v, offsets, max_length, dropout_p)
    samples, heads, size = len(offsets) - 1, q.shape[1], q.shape[2]
    rows, slots, mask = padded_places(offsets, max_length, len(q))

    def by_head(x: torch.Tensor) -> torch.Tensor:
        padded = gather_rows(x.reshape(len(x), -1), rows, slots).view(samples, max_length, heads, size)
        return padded.transpose(1, 2).reshape(samples * heads, max_length, size)

    hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    hidden = hidden[:, None, None, :].expand(-1, heads, -1, -1).reshape(samples * heads, 1, max_length)
    weights = torch.baddbmm(hidden, by_head(q), by_head(k).transpose(1, 2), alpha=size**-0.5).softmax(dim=-1)
    attended = torch.bmm(dropout(weights, dropout_p), by_head(v)).view(samples, heads, max_length, size)
    return attended.transpose(1, 2).reshape(samples * max_length, heads, size).index_select(0, slots)
