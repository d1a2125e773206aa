"""Attention over packed sequences: padded SDPA on any device, variable-length flash attention on CUDA."""

import torch
import torch.nn.functional as F

from megatron_interbert.kernels.gather import gather_rows


def padded_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_length: int, dropout_p: float
) -> torch.Tensor:
    """Pads to `max_length` inside the call only; q, k, v [N, heads, D], offsets [B+1] -> [N, heads, D]."""
    count, samples = len(q), len(offsets) - 1
    if count == samples * max_length:  # all of one length: nothing to pad
        queries, keys, values = (x.view(samples, max_length, *q.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout_p).transpose(1, 2).flatten(0, 1)
    rows, slots, mask = padded_places(offsets, max_length, count)
    padded = gather_rows(torch.cat([q, k, v], dim=1), rows, slots)
    queries, keys, values = padded.view(samples, max_length, 3, *q.shape[1:]).permute(2, 0, 3, 1, 4)
    result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None, :], dropout_p=dropout_p)
    return result.transpose(1, 2).reshape(samples * max_length, *q.shape[1:]).index_select(0, slots)


def padded_places(offsets: torch.Tensor, max_length: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How `count` packed rows are laid out in [B, max_length]: the row of each place, the place of each row, which places may be
    attended to [B, max_length].

    Padding repeats the last real row; nothing attends to it and its result is dropped. No boolean indexing: the host would wait for the
    device.
    """
    samples, lengths = len(offsets) - 1, offsets[1:] - offsets[:-1]
    place = torch.arange(max_length, device=offsets.device)
    rows = torch.minimum(offsets[:-1, None] + place, (offsets[1:, None] - 1).clamp(min=0)).flatten()
    sample = torch.repeat_interleave(torch.arange(samples, device=offsets.device), lengths, output_size=count)
    slots = sample * max_length + torch.arange(count, device=offsets.device) - offsets[sample]
    mask = place < lengths[:, None]
    mask[:, 0] = True  # an empty sequence would give NaN, also in the gradient
    return rows, slots, mask


def varlen_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_length: int, dropout_p: float
) -> torch.Tensor:
    """torch's varlen_attn (CUDA, half precision); it has no dropout, so calls with dropout take padded SDPA."""
    if dropout_p > 0 or q.dtype not in (torch.float16, torch.bfloat16):
        return padded_sdpa(q, k, v, offsets, max_length, dropout_p)
    from torch.nn.attention.varlen import varlen_attn  # CUDA only, absent from some CPU builds

    return varlen_attn(q, k, v, offsets, offsets, max_length, max_length)
