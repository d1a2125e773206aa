"""Attention over packed sequences: padded SDPA on any device, variable-length flash attention on CUDA."""

import torch
import torch.nn.functional as F

from megatron_interbert.kernels.gather import gather_rows


def padded_sdpa(qkv: torch.Tensor, offsets: torch.Tensor, max_length: int, dropout_p: float) -> torch.Tensor:
    """See plain.attention: pads to `max_length` inside the call only."""
    tokens, heads, _three, size = qkv.shape
    samples = len(offsets) - 1
    if tokens == samples * max_length:  # all of one length: nothing to pad
        queries, keys, values = by_head(qkv, samples, max_length)
        attended = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout_p)
        return attended.transpose(1, 2).flatten(0, 1)

    rows, slots, mask = padded_places(offsets, max_length, tokens)
    queries, keys, values = by_head(gather_rows(qkv, rows, slots), samples, max_length)
    mask = mask[:, None, None, :]
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout_p)
    return attended.transpose(1, 2).reshape(samples * max_length, heads, size).index_select(0, slots)


def by_head(qkv: torch.Tensor, samples: int, length: int) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, heads, L, D] as views of tokens [B L, heads, 3, D]; their gradients come together again in one tensor."""
    parts = qkv.view(samples, length, *qkv.shape[1:]).unbind(3)
    return tuple(part.transpose(1, 2) for part in parts)


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


def flash_takes(qkv: torch.Tensor, dropout_p: float) -> bool:
    """Whether torch's variable-length flash attention computes this: it has no dropout, and knows 16 bits only."""
    return dropout_p == 0 and qkv.dtype in (torch.float16, torch.bfloat16)


def varlen_flash(qkv: torch.Tensor, offsets: torch.Tensor, max_length: int, dropout_p: float) -> torch.Tensor:
    """See plain.attention: torch's varlen_attn (CUDA, compute capability 8.0); what it does not take goes to padded SDPA."""
    if not flash_takes(qkv, dropout_p):
        return padded_sdpa(qkv, offsets, max_length, dropout_p)
    from torch.nn.attention.varlen import varlen_attn  # CUDA only, absent from some CPU builds

    return varlen_attn(*qkv.unbind(2), offsets, offsets, max_length, max_length)
