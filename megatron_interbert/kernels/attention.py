"""Attention over packed sequences: padded SDPA on any device, variable-length flash attention on CUDA."""

import torch
import torch.nn.functional as F


def padded_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_length: int,
                dropout_p: float) -> torch.Tensor:
    """Pads to `max_length` inside the call only; q, k, v [N, heads, D], offsets [B+1] -> [N, heads, D]."""
    count, heads, width = q.shape
    samples = len(offsets) - 1
    lengths = offsets[1:] - offsets[:-1]
    place = torch.arange(max_length, device=q.device)
    real = place < lengths[:, None]
    # Row of the packed tensors for each padded slot; padding repeats the last real row, whose result is dropped again.
    rows = torch.minimum(offsets[:-1, None] + place, (offsets[1:, None] - 1).clamp(min=0)).long()
    queries, keys, values = (t[rows].transpose(1, 2) for t in (q, k, v))  # [B, heads, L, D]
    mask = real.clone()
    mask[:, 0] = True  # an empty sequence would give NaN, also in the gradient
    result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None, :], dropout_p=dropout_p)
    # No boolean indexing: it would make the host wait for the device.
    sample = torch.repeat_interleave(torch.arange(samples, device=q.device), lengths, output_size=count)
    slot = sample * max_length + torch.arange(count, device=q.device) - offsets[sample]
    return result.transpose(1, 2).reshape(samples * max_length, heads, width)[slot]


def varlen_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_length: int,
                 dropout_p: float) -> torch.Tensor:
    """torch's varlen_attn (CUDA, half precision); it has no dropout, so calls with dropout take padded SDPA."""
    if dropout_p > 0 or q.dtype not in (torch.float16, torch.bfloat16):
        return padded_sdpa(q, k, v, offsets, max_length, dropout_p)
    from torch.nn.attention.varlen import varlen_attn  # CUDA only, absent from some CPU builds

    return varlen_attn(q, k, v, offsets, offsets, max_length, max_length)
