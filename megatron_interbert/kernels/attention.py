"""Compute attention over packed sequences: by padded SDPA on any device, by variable-length flash
attention on CUDA.
"""

import torch
import torch.nn.functional as F

from megatron_interbert.kernels.gather import gather_rows
from megatron_interbert.kernels.sequences import Sequences, padded_places


def padded_sdpa(qkv: torch.Tensor, sequences: Sequences, dropout_p: float) -> torch.Tensor:
    """See plain.attention; sequences are padded to the longest inside this call only."""
    tokens, heads, _three, size = qkv.shape
    samples = len(sequences)
    longest = sequences.longest

    if tokens == samples * longest:  # all of one length: nothing to pad
        queries, keys, values = by_head(qkv, samples, longest)
        attended = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout_p)
        return attended.transpose(1, 2).flatten(0, 1)

    rows, slots, seen = sequences.once(padded_places, tokens)
    queries, keys, values = by_head(gather_rows(qkv, rows, slots), samples, longest)
    mask = seen[:, None, None, :]
    attended = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, dropout_p=dropout_p
    )

    return attended.transpose(1, 2).reshape(samples * longest, heads, size).index_select(0, slots)


def by_head(qkv: torch.Tensor, samples: int, length: int) -> tuple[torch.Tensor, ...]:
    """Return q, k, v [B, heads, L, D] as views of tokens [B L, heads, 3, D], whose gradient is then
    one tensor again.
    """
    parts = qkv.view(samples, length, *qkv.shape[1:]).unbind(3)
    return tuple(part.transpose(1, 2) for part in parts)


def flash_takes(qkv: torch.Tensor, dropout_p: float) -> bool:
    """Check whether torch's variable-length flash attention can compute this: only in 16 bits and
    without dropout.
    """
    return dropout_p == 0 and qkv.dtype in (torch.float16, torch.bfloat16)


def varlen_flash(qkv: torch.Tensor, sequences: Sequences, dropout_p: float) -> torch.Tensor:
    """See plain.attention; torch's varlen_attn (CUDA, compute capability 8.0 or newer), or padded
    SDPA for what that cannot compute.
    """
    if not flash_takes(qkv, dropout_p):
        return padded_sdpa(qkv, sequences, dropout_p)

    from torch.nn.attention.varlen import varlen_attn  # CUDA only, absent from some CPU builds

    offsets = sequences.offsets
    longest = sequences.longest

    return varlen_attn(*qkv.unbind(2), offsets, offsets, longest, longest)
