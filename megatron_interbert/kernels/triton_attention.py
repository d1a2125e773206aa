"""Compute attention over packed sequences in Triton, with dropout inside and no padding in memory.

Sequences that fit in one tile take the whole-row kernels: one program for each sequence and head
holds all its scores, so that the softmax needs no second pass and the backward pass computes them
once. Longer ones take the tiled kernels: a program has some rows of the scores and goes over the
columns tile by tile (the online softmax of FlashAttention, arXiv 2205.14135 and 2307.08691).

Both recompute scores and dropout mask in the backward pass. Each gradient is written once, by one
program, so results are the same bits every time. Queries, keys and values come as one tensor, and
so do their gradients.

Legend: N tokens of all sequences, B sequences, D size of a head, WIDTH the tile's columns for it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from megatron_interbert.kernels import attention
from megatron_interbert.kernels.fit import gpu_of, tile_for, tile_width
from megatron_interbert.kernels.sequences import Sequences
from megatron_interbert.kernels.triton_ops import draw_seed

SMALLEST = 32  # tokens of the smallest whole-row tile: fewer sizes need fewer compilations
INTERPRETED_MEMORY = 1 << 30  # bytes; the interpreter has no limit

QUERY = tl.constexpr(0)
KEY = tl.constexpr(1)
VALUE = tl.constexpr(2)


@triton.jit
def _places(first, rows, length, part, PARTS: tl.constexpr, width, WIDTH: tl.constexpr):
    """Return the offsets of `rows` of this program's sequence and head in a contiguous [N, heads,
    PARTS, D], and the mask of those that exist.
    """
    columns = tl.arange(0, WIDTH)
    token = (first + rows).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    at = (token * PARTS + part)[:, None] * width + columns[None, :]

    return at, (rows[:, None] < length) & (columns[None, :] < width)


@triton.jit
def _load(ptr, first, rows, length, part, PARTS: tl.constexpr, width, WIDTH: tl.constexpr):
    """Load a tile [rows, WIDTH], with 0 outside the sequence and the head."""
    at, inside = _places(first, rows, length, part, PARTS, width, WIDTH)
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def _store(ptr, tile, first, rows, length, part, PARTS: tl.constexpr, width, WIDTH: tl.constexpr):
    at, inside = _places(first, rows, length, part, PARTS, width, WIDTH)
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sequence(offsets_ptr):
    """Return (first token, length) of this program's sequence."""
    first = tl.load(offsets_ptr + tl.program_id(0))
    return first, tl.load(offsets_ptr + tl.program_id(0) + 1) - first


@triton.jit
def _scores(q, k, rows, columns, length, scale):
    """Return the scaled scores [rows, columns] in float32, -1e30 past the end of the sequence,
    which softmax turns into 0.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where((rows[:, None] < length) & (columns[None, :] < length), scores, -1.0e30)


@triton.jit
def _kept(first, rows, columns, p, seed):
    """Return the factors by which dropout multiplies the weights [rows, columns].

    They depend on the seed and on a weight's place in the batch, not on the tile.
    """
    row = ((first + rows) * tl.num_programs(1) + tl.program_id(1))[:, None] + tl.zeros_like(
        columns
    )[None, :]
    column = tl.zeros_like(rows)[:, None] + columns[None, :]
    word, _second, _third, _fourth = tl.philox(seed, row, column, 0, 0)

    return tl.where(tl.uint_to_uniform_float(word) >= p, 1.0 / (1.0 - p), 0.0)


@triton.jit
def _whole_rows(qkv_ptr, first, length, scale, width, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Return (q, k, v, softmax of their scores in float32) of a sequence that fits in one tile.

    Rows past its end are 0.
    """
    rows = tl.arange(0, TILE)
    q = _load(qkv_ptr, first, rows, length, QUERY, 3, width, WIDTH)
    k = _load(qkv_ptr, first, rows, length, KEY, 3, width, WIDTH)
    v = _load(qkv_ptr, first, rows, length, VALUE, 3, width, WIDTH)
    scores = _scores(q, k, rows, rows, length, scale)
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]

    return q, k, v, tl.where(rows[:, None] < length, weights, 0.0)


@triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["offsets_ptr"])
def _row_forward(
    qkv_ptr,
    offsets_ptr,
    out_ptr,
    scale,
    p,
    seed,
    width,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    first, length = _sequence(offsets_ptr)
    rows = tl.arange(0, TILE)
    _q, _k, v, weights = _whole_rows(qkv_ptr, first, length, scale, width, TILE, WIDTH)
    if DROPOUT:
        weights *= _kept(first, rows, rows, p, seed)

    out = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    _store(out_ptr, out, first, rows, length, 0, 1, width, WIDTH)


@triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["offsets_ptr"])
def _row_backward(
    qkv_ptr,
    offsets_ptr,
    dout_ptr,
    dqkv_ptr,
    scale,
    p,
    seed,
    width,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    first, length = _sequence(offsets_ptr)
    rows = tl.arange(0, TILE)
    q, k, v, weights = _whole_rows(qkv_ptr, first, length, scale, width, TILE, WIDTH)
    dout = _load(dout_ptr, first, rows, length, 0, 1, width, WIDTH)
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
    dropped = weights

    if DROPOUT:
        kept = _kept(first, rows, rows, p, seed)
        dropped = weights * kept
        dweights *= kept

    dv = tl.dot(tl.trans(dropped).to(v.dtype), dout, input_precision="ieee")
    _store(dqkv_ptr, dv, first, rows, length, VALUE, 3, width, WIDTH)
    dscores = (weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None]) * scale).to(
        q.dtype
    )
    dq = tl.dot(dscores, k, input_precision="ieee")
    _store(dqkv_ptr, dq, first, rows, length, QUERY, 3, width, WIDTH)
    dk = tl.dot(tl.trans(dscores), q, input_precision="ieee")
    _store(dqkv_ptr, dk, first, rows, length, KEY, 3, width, WIDTH)


@triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["offsets_ptr"])
def _tiled_forward(
    qkv_ptr,
    offsets_ptr,
    out_ptr,
    normaliser_ptr,
    scale,
    p,
    seed,
    width,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Compute the result of one tile of rows, and the logarithm of each row's sum of exponentials
    [N, heads].
    """
    first, length = _sequence(offsets_ptr)
    start = tl.program_id(2) * TILE
    if start >= length:
        return

    rows = start + tl.arange(0, TILE)
    q = _load(qkv_ptr, first, rows, length, QUERY, 3, width, WIDTH)
    largest = tl.full([TILE], -1.0e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, WIDTH], tl.float32)

    for begin in range(0, length, TILE):
        columns = begin + tl.arange(0, TILE)
        k = _load(qkv_ptr, first, columns, length, KEY, 3, width, WIDTH)
        v = _load(qkv_ptr, first, columns, length, VALUE, 3, width, WIDTH)
        scores = _scores(q, k, rows, columns, length, scale)
        new = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp(largest - new)
        weights = tl.exp(scores - new[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        if DROPOUT:  # after the sum above, which is over all weights
            weights *= _kept(first, rows, columns, p, seed)

        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = new

    _store(out_ptr, out / total[:, None], first, rows, length, 0, 1, width, WIDTH)
    at = (first + rows).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(normaliser_ptr + at, largest + tl.log(total), mask=rows < length)


@triton.jit
def _weights_again(
    q, k, normaliser, first, rows, columns, length, scale, p, seed, DROPOUT: tl.constexpr
):
    """Return (softmax of a tile of scores by the rows' normalisers, its dropout factors)."""
    weights = tl.exp(_scores(q, k, rows, columns, length, scale) - normaliser[:, None])
    weights = tl.where(rows[:, None] < length, weights, 0.0)
    kept = tl.full(weights.shape, 1.0, tl.float32)
    if DROPOUT:
        kept = _kept(first, rows, columns, p, seed)

    return weights, kept


@triton.jit
def _rows_of_backward(
    qkv_ptr, out_ptr, dout_ptr, normaliser_ptr, first, rows, length, width, WIDTH: tl.constexpr
):
    """Return what the backward pass reads of a tile of rows: q, the gradient of the result, the
    normaliser, and each row's sum of weights times their gradients, which equals that of the result
    times its gradient.
    """
    q = _load(qkv_ptr, first, rows, length, QUERY, 3, width, WIDTH)
    out = _load(out_ptr, first, rows, length, 0, 1, width, WIDTH)
    dout = _load(dout_ptr, first, rows, length, 0, 1, width, WIDTH)
    at = (first + rows).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    normaliser = tl.load(normaliser_ptr + at, mask=rows < length, other=0.0)

    return q, dout, normaliser, tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)


@triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["offsets_ptr"])
def _tiled_backward(
    qkv_ptr,
    offsets_ptr,
    out_ptr,
    dout_ptr,
    normaliser_ptr,
    dqkv_ptr,
    scale,
    p,
    seed,
    width,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Compute the gradients of the keys and values of one tile of tokens, over all queries, then
    those of its queries, over all keys.
    """
    first, length = _sequence(offsets_ptr)
    start = tl.program_id(2) * TILE
    if start >= length:
        return

    mine = start + tl.arange(0, TILE)
    k = _load(qkv_ptr, first, mine, length, KEY, 3, width, WIDTH)
    v = _load(qkv_ptr, first, mine, length, VALUE, 3, width, WIDTH)
    dk = tl.zeros([TILE, WIDTH], tl.float32)
    dv = tl.zeros([TILE, WIDTH], tl.float32)

    for begin in range(0, length, TILE):
        rows = begin + tl.arange(0, TILE)
        q, dout, normaliser, shared = _rows_of_backward(
            qkv_ptr, out_ptr, dout_ptr, normaliser_ptr, first, rows, length, width, WIDTH
        )
        weights, kept = _weights_again(
            q, k, normaliser, first, rows, mine, length, scale, p, seed, DROPOUT
        )
        dv += tl.dot(tl.trans(weights * kept).to(v.dtype), dout, input_precision="ieee")
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee") * kept
        dscores = weights * (dweights - shared[:, None]) * scale
        dk += tl.dot(tl.trans(dscores).to(q.dtype), q, input_precision="ieee")

    _store(dqkv_ptr, dk, first, mine, length, KEY, 3, width, WIDTH)
    _store(dqkv_ptr, dv, first, mine, length, VALUE, 3, width, WIDTH)

    q, dout, normaliser, shared = _rows_of_backward(
        qkv_ptr, out_ptr, dout_ptr, normaliser_ptr, first, mine, length, width, WIDTH
    )
    dq = tl.zeros([TILE, WIDTH], tl.float32)

    for begin in range(0, length, TILE):
        columns = begin + tl.arange(0, TILE)
        k = _load(qkv_ptr, first, columns, length, KEY, 3, width, WIDTH)
        v = _load(qkv_ptr, first, columns, length, VALUE, 3, width, WIDTH)
        weights, kept = _weights_again(
            q, k, normaliser, first, mine, columns, length, scale, p, seed, DROPOUT
        )
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee") * kept
        dscores = weights * (dweights - shared[:, None]) * scale
        dq += tl.dot(dscores.to(k.dtype), k, input_precision="ieee")

    _store(dqkv_ptr, dq, first, mine, length, QUERY, 3, width, WIDTH)


def warps(tile: int, width: int, element: int, tiled: bool) -> int:
    """Return the warps of a program: as few as keep its tiles in registers on every GPU
    (tests/campaigns/tiles.py counts spills).
    """
    if element > 2:
        return 16 if tile * width > 32 * 64 else 8
    return 8 if tiled and tile > 32 else 4


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        sequences: Sequences,
        dropout_p: float,
        seed: int,
        tile: int,
    ) -> torch.Tensor:
        """Save qkv, and for the tiled kernels the result and the rows' normalisers, from which
        backward recomputes scores and mask.
        """
        qkv = qkv.contiguous()
        tokens, heads, _three, head = qkv.shape
        offsets = sequences.offsets
        longest = sequences.longest
        out = torch.empty(tokens, heads, head, dtype=qkv.dtype, device=qkv.device)

        ctx.tiled = longest > tile
        if not ctx.tiled:
            tile = min(tile, max(SMALLEST, triton.next_power_of_2(longest)))

        width = tile_width(head)
        ctx.grid = (len(sequences), heads, triton.cdiv(longest, tile))
        ctx.numbers = (head**-0.5, dropout_p, seed, head)
        ctx.settings = {
            "TILE": tile,
            "WIDTH": width,
            "DROPOUT": dropout_p > 0,
            "num_warps": warps(tile, width, qkv.element_size(), ctx.tiled),
            "num_stages": 1,  # each further stage would keep another pair of tiles in shared memory
        }

        if ctx.tiled:
            normaliser = torch.empty(tokens, heads, dtype=torch.float32, device=qkv.device)
            _tiled_forward[ctx.grid](qkv, offsets, out, normaliser, *ctx.numbers, **ctx.settings)
            ctx.save_for_backward(qkv, offsets, out, normaliser)
        else:
            _row_forward[ctx.grid](qkv, offsets, out, *ctx.numbers, **ctx.settings)
            ctx.save_for_backward(qkv, offsets)

        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return one gradient for queries, keys and values."""
        qkv, offsets, *of_tiles = ctx.saved_tensors
        dout = dout.contiguous()
        dqkv = torch.empty_like(qkv)

        if ctx.tiled:
            out, normaliser = of_tiles
            _tiled_backward[ctx.grid](
                qkv, offsets, out, dout, normaliser, dqkv, *ctx.numbers, **ctx.settings
            )
        else:
            _row_backward[ctx.grid](qkv, offsets, dout, dqkv, *ctx.numbers, **ctx.settings)

        return dqkv, None, None, None, None


def packed_attention(qkv: torch.Tensor, sequences: Sequences, dropout_p: float) -> torch.Tensor:
    """See plain.attention; heads for which no tile fits on this device go to padded SDPA."""
    if len(qkv) == 0:
        return qkv[:, :, 0]

    room = gpu_of(qkv.device).shared_memory if qkv.is_cuda else INTERPRETED_MEMORY
    tile = tile_for(qkv.shape[-1], qkv.dtype, room)
    if tile is None:
        return attention.padded_sdpa(qkv, sequences, dropout_p)

    return _Attention.apply(qkv, sequences, dropout_p, draw_seed(dropout_p), tile)


def flash_attention(qkv: torch.Tensor, sequences: Sequences, dropout_p: float) -> torch.Tensor:
    """See plain.attention; torch's own in 16 bits without dropout, else `packed_attention`."""
    if attention.flash_takes(qkv, dropout_p):
        return attention.varlen_flash(qkv, sequences, dropout_p)
    return packed_attention(qkv, sequences, dropout_p)
