"""Attention over short packed sequences in Triton: one program for each sequence and head, whole score rows, dropout inside.

A program holds all scores of its sequence, so the softmax needs no second pass, nothing is padded in memory, and each gradient is
written once by one program: the same bits every time. The scores and the dropout mask are computed again in the backward pass.

The numbers of warps are those with which ptxas for sm_90 spills least (tiles of 64: nothing).
"""

import torch
import triton
import triton.language as tl

LONGEST = 128  # tokens of a sequence; the score tile must stay in registers
WIDEST = 128  # size of a head


@triton.jit
def _tile(base, first, head, row_stride, head_stride, rows, columns, inside):
    """[rows, columns] of one head of packed tokens [N, heads, D]."""
    at = base + (first + rows)[:, None].to(tl.int64) * row_stride + head * head_stride + columns[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _weights(q, k, length, scale, rows):
    """Softmax [rows, keys] in float32; rows and keys past the end get 0."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    there = (rows[:, None] < length) & (rows[None, :] < length)
    scores = tl.where(there, scores, -1.0e30)
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = tl.where(there, weights, 0.0)
    total = tl.sum(weights, axis=1)
    return weights / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit
def _kept(seed, program, rows, p, LENGTH: tl.constexpr):
    """1 / (1 - p) where a weight is kept, 0 where it is dropped: from a counter that each weight of the batch has for itself."""
    counter = (program * LENGTH + rows)[:, None] * LENGTH + rows[None, :]
    return tl.where(tl.rand(seed, counter) >= p, 1.0 / (1.0 - p), 0.0)


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    offsets_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    out_head,
    scale,
    p,
    seed,
    width,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    sample, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(offsets_ptr + sample)
    length = tl.load(offsets_ptr + sample + 1) - first
    rows, columns = tl.arange(0, LENGTH), tl.arange(0, WIDTH)
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    q = _tile(q_ptr, first, head, q_row, q_head, rows, columns, inside)
    k = _tile(k_ptr, first, head, k_row, k_head, rows, columns, inside)
    v = _tile(v_ptr, first, head, v_row, v_head, rows, columns, inside)
    weights = _weights(q, k, length, scale, rows)
    if DROPOUT:
        weights *= _kept(seed, sample * tl.num_programs(1) + head, rows, p, LENGTH)
    out = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    at = out_ptr + (first + rows)[:, None].to(tl.int64) * out_row + head * out_head + columns[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    offsets_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    out_head,
    scale,
    p,
    seed,
    width,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    sample, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(offsets_ptr + sample)
    length = tl.load(offsets_ptr + sample + 1) - first
    rows, columns = tl.arange(0, LENGTH), tl.arange(0, WIDTH)
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    q = _tile(q_ptr, first, head, q_row, q_head, rows, columns, inside)
    k = _tile(k_ptr, first, head, k_row, k_head, rows, columns, inside)
    v = _tile(v_ptr, first, head, v_row, v_head, rows, columns, inside)
    dout = _tile(dout_ptr, first, head, out_row, out_head, rows, columns, inside)
    weights = _weights(q, k, length, scale, rows)
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
    dropped = weights
    if DROPOUT:
        kept = _kept(seed, sample * tl.num_programs(1) + head, rows, p, LENGTH)
        dropped = weights * kept
        dweights *= kept
    dv = tl.dot(tl.trans(dropped).to(v.dtype), dout, input_precision="ieee")
    dscores = weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None]) * scale
    dq = tl.dot(dscores.to(k.dtype), k, input_precision="ieee")
    dk = tl.dot(tl.trans(dscores).to(q.dtype), q, input_precision="ieee")
    at = (first + rows)[:, None].to(tl.int64) * out_row + head * out_head + columns[None, :]
    tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def _block(size: int) -> int:
    """The tile that holds `size`; matrix products want 16 at least."""
    return max(16, triton.next_power_of_2(size))


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, offsets, max_length, p, seed):
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        ctx.save_for_backward(q, k, v, offsets)
        ctx.settings = (max_length, p, seed)
        grid, strides, sizes = _launch(q, k, v, out, offsets, max_length, p, seed)
        _forward[grid](q, k, v, out, offsets, *strides, **sizes, num_warps=16 if sizes["LENGTH"] > 64 else 8)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, offsets = ctx.saved_tensors
        dout = dout.contiguous()
        dq, dk, dv = (torch.empty_like(dout) for _ in range(3))
        grid, strides, sizes = _launch(q, k, v, dout, offsets, *ctx.settings)
        _backward[grid](q, k, v, dout, dq, dk, dv, offsets, *strides, **sizes, num_warps=8)
        return dq, dk, dv, None, None, None, None


def _launch(q, k, v, out, offsets, max_length, p, seed):
    """(grid, strides of q, k, v and of the result, the other arguments of both kernels)."""
    heads, width = q.shape[1:]
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:2]]
    blocks = {"LENGTH": _block(max_length), "WIDTH": _block(width), "DROPOUT": p > 0}
    return (len(offsets) - 1, heads), strides, {"scale": width**-0.5, "p": p, "seed": seed, "width": width, **blocks}


def takes(q: torch.Tensor, max_length: int) -> bool:
    """Whether the kernel has room for sequences of this length and heads of this size."""
    return 0 < max_length <= LONGEST and q.shape[2] <= WIDEST and len(q) > 0


def short_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_length: int, dropout_p: float
) -> torch.Tensor:
    """See plain.attention; longer sequences or wider heads go to padded SDPA. The seed comes from the CPU generator, as that of
    triton_ops.dropout_add_norm does."""
    if not takes(q, max_length):
        from megatron_interbert.kernels.attention import padded_sdpa

        return padded_sdpa(q, k, v, offsets, max_length, dropout_p)
    seed = int(torch.randint(2**31 - 1, (1,))) if dropout_p > 0 else 0
    return _ShortAttention.apply(q, k, v, offsets, max_length, dropout_p, seed)
