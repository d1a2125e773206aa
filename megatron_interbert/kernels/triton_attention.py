"""Attention over short packed sequences in Triton: one program for each sequence and head, whole score rows, dropout inside.

A program holds all scores of its sequence, so the softmax needs no second pass, nothing is padded in memory, and each gradient is
written once by one program: the same bits every time. The scores and the dropout mask are computed again in the backward pass.

The numbers of warps are those with which ptxas for sm_90 spills least (tiles of 64: nothing).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from megatron_interbert.kernels.triton_ops import draw_seed

LONGEST = 128  # tokens of a sequence; the score tile must stay in registers
WIDEST = 128  # size of a head


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, offsets_ptr, row_stride, head_stride, scale, p, seed, width,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """What both passes need of this program's sequence and head: tiles q, k, v [LENGTH, WIDTH], the weights [LENGTH, LENGTH] before
    dropout in float32, and what dropout multiplies them by. Places past the end hold 0."""
    sample, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(offsets_ptr + sample)
    length = tl.load(offsets_ptr + sample + 1) - first
    rows, columns = tl.arange(0, LENGTH), tl.arange(0, WIDTH)
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    at = (first + rows)[:, None].to(tl.int64) * row_stride + head * head_stride + columns[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    k = tl.load(k_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    there = (rows[:, None] < length) & (rows[None, :] < length)
    scores = tl.where(there, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -1.0e30)
    weights = tl.where(there, tl.exp(scores - tl.max(scores, axis=1)[:, None]), 0.0)
    total = tl.sum(weights, axis=1)
    weights = weights / tl.where(total > 0.0, total, 1.0)[:, None]
    kept = tl.full([LENGTH, LENGTH], 1.0, tl.float32)
    if DROPOUT:  # from a counter that each weight of the batch has for itself
        program = sample * tl.num_programs(1) + head
        counter = (program * LENGTH + rows)[:, None] * LENGTH + rows[None, :]
        kept = tl.where(tl.rand(seed, counter) >= p, 1.0 / (1.0 - p), 0.0)
    return q, k, v, weights, kept


@triton.jit
def _places(offsets_ptr, width, LENGTH: tl.constexpr, WIDTH: tl.constexpr):
    """Where this program's results lie in a contiguous [N, heads, width], and which of them there are."""
    first = tl.load(offsets_ptr + tl.program_id(0))
    length = tl.load(offsets_ptr + tl.program_id(0) + 1) - first
    rows, columns = tl.arange(0, LENGTH), tl.arange(0, WIDTH)
    at = ((first + rows)[:, None].to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * width + columns[None, :]
    return at, (rows[:, None] < length) & (columns[None, :] < width)


@triton.jit
def _forward(
    out_ptr, q_ptr, k_ptr, v_ptr, offsets_ptr, row_stride, head_stride, scale, p, seed, width,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    _q, _k, v, weights, kept = _attend(
        q_ptr, k_ptr, v_ptr, offsets_ptr, row_stride, head_stride, scale, p, seed, width, LENGTH, WIDTH, DROPOUT
    )
    at, inside = _places(offsets_ptr, width, LENGTH, WIDTH)
    out = tl.dot((weights * kept).to(v.dtype), v, input_precision="ieee")
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dout_ptr, dq_ptr, dk_ptr, dv_ptr, q_ptr, k_ptr, v_ptr, offsets_ptr, row_stride, head_stride, scale, p, seed, width,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    q, k, v, weights, kept = _attend(
        q_ptr, k_ptr, v_ptr, offsets_ptr, row_stride, head_stride, scale, p, seed, width, LENGTH, WIDTH, DROPOUT
    )
    at, inside = _places(offsets_ptr, width, LENGTH, WIDTH)
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0)
    dv = tl.dot(tl.trans(weights * kept).to(v.dtype), dout, input_precision="ieee")
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee") * kept
    dscores = weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None]) * scale
    dq = tl.dot(dscores.to(k.dtype), k, input_precision="ieee")
    dk = tl.dot(tl.trans(dscores).to(q.dtype), q, input_precision="ieee")
    tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def _block(size: int) -> int:
    """The tile that holds `size`; matrix products want 16 at least."""
    return max(16, triton.next_power_of_2(size))


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        offsets: torch.Tensor,
        max_length: int,
        dropout_p: float,
        seed: int,
    ) -> torch.Tensor:
        """Keeps q, k, v: scores and mask are computed again."""
        if not (q.stride() == k.stride() == v.stride() and q.stride(2) == 1):  # not views of one projection
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        ctx.save_for_backward(q, k, v, offsets)
        ctx.grid = (len(offsets) - 1, q.shape[1])
        ctx.settings = {
            **{"row_stride": q.stride(0), "head_stride": q.stride(1), "scale": q.shape[2] ** -0.5, "p": dropout_p, "seed": seed},
            **{"width": q.shape[2], "LENGTH": _block(max_length), "WIDTH": _block(q.shape[2]), "DROPOUT": dropout_p > 0},
        }
        _forward[ctx.grid](out, q, k, v, offsets, **ctx.settings, num_warps=16 if max_length > 64 else 8)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dout = dout.contiguous()
        dq, dk, dv = (torch.empty_like(dout) for _ in range(3))
        _backward[ctx.grid](dout, dq, dk, dv, *ctx.saved_tensors, **ctx.settings, num_warps=8)
        return dq, dk, dv, None, None, None, None


def takes(q: torch.Tensor, max_length: int) -> bool:
    """Whether the kernel has room for sequences of this length and heads of this size."""
    return 0 < max_length <= LONGEST and q.shape[2] <= WIDEST and len(q) > 0


def short_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_length: int, dropout_p: float
) -> torch.Tensor:
    """See plain.attention; longer sequences or wider heads go to padded SDPA."""
    if not takes(q, max_length):
        from megatron_interbert.kernels.attention import padded_sdpa

        return padded_sdpa(q, k, v, offsets, max_length, dropout_p)
    return _ShortAttention.apply(q, k, v, offsets, max_length, dropout_p, draw_seed(dropout_p))
