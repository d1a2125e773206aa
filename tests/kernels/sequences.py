"""Make packed sequences for tests of attention."""

import itertools

import torch

from megatron_interbert.kernels.sequences import Sequences


def packed(
    lengths: list[int],
    heads: int = 3,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[torch.Tensor, Sequences]:
    """Make qkv [N, heads, 3, width], which requires a gradient, and its sequences' offsets."""
    qkv = torch.randn(sum(lengths), heads, 3, width).to(device, dtype)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return qkv.requires_grad_(), Sequences(offsets, max(lengths))
