"""Packed sequences for tests of attention."""

import itertools

import torch


def packed(
    lengths: list[int], heads: int = 3, width: int = 8, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv [N, heads, 3, width], which wants a gradient, and the offsets."""
    qkv = torch.randn(sum(lengths), heads, 3, width).to(device, dtype)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return qkv.requires_grad_(), offsets
