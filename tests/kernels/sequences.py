"""Packed sequences for tests of attention."""

import itertools

import torch


def packed(lengths, heads=3, width=8, dtype=torch.float32):
    """q, k, v [N, heads, width] as views of one projection, as the model has them, and the offsets."""
    qkv = torch.randn(sum(lengths), heads, 3, width, dtype=dtype)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return [x.requires_grad_() for x in qkv.unbind(2)], offsets
