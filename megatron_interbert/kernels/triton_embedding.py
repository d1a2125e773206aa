"""Assemble embeddings in Triton: one pass over the regions of a batch, and one over the tokens of
each kind.

Dropout follows the norm here; the backward pass redraws its mask from (seed, element). The
gradients of tables and of the location projection are computed by torch, as sums over tokens of a
gradient that the backward kernel writes once.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from megatron_interbert.kernels import plain
from megatron_interbert.kernels.triton_ops import (
    MAX_PROGRAMS,
    draw_seed,
    normal_row,
    stays,
    through_norm,
)

LOCATION = 5  # numbers in a region's location


@triton.jit(do_not_specialize_on_alignment=["shown_ptr", "starts_ptr", "summary_ptr"])
def _region_rows(
    features_ptr, shown_ptr, starts_ptr, summary_ptr, out_ptr, width, BLOCK: tl.constexpr
):
    """Write some columns of one image: its regions at their rows, hidden ones as zeros, and their
    mean before them.
    """
    image = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first = tl.load(starts_ptr + image)
    last = tl.load(starts_ptr + image + 1)
    summary = tl.load(summary_ptr + image)
    total = tl.zeros([BLOCK], dtype=tl.float32)

    for region in range(first, last):
        at = features_ptr + region * width + column
        x = tl.where(
            tl.load(shown_ptr + region) != 0,
            tl.load(at, mask=inside, other=0.0).to(tl.float32),
            0.0,
        )
        total += x
        to = out_ptr + (summary + 1 + region - first) * width + column
        tl.store(to, x.to(out_ptr.dtype.element_ty), mask=inside)

    mean = total / (last - first)
    tl.store(out_ptr + summary * width + column, mean.to(out_ptr.dtype.element_ty), mask=inside)


def region_rows(
    features: torch.Tensor,
    hidden: torch.Tensor,
    counts: torch.Tensor,
    region_rows: torch.Tensor,
    summary_rows: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See plain.region_rows, which also serves features that need a gradient."""
    if features.requires_grad or not len(counts):
        return plain.region_rows(features, hidden, counts, region_rows, summary_rows, dtype)

    width = features.shape[1]
    out = torch.empty(
        len(region_rows) + len(summary_rows), width, dtype=dtype, device=features.device
    )
    shown = torch.ones(len(features), dtype=torch.bool, device=features.device).index_fill_(
        0, hidden, False
    )
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    block = min(1024, triton.next_power_of_2(width))
    _region_rows[(len(counts), triton.cdiv(width, block))](
        features.contiguous(), shown, starts, summary_rows, out, width, BLOCK=block
    )

    return out


@triton.jit
def _normalise(
    z,
    row,
    column,
    inside,
    weight_ptr,
    bias_ptr,
    z_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    width,
    p,
    eps,
    seed,
):
    """Write the sum z of a row, its mean and 1 / deviation, and dropout(LayerNorm(z))."""
    at = row.to(tl.int64) * width + column
    normal, mean, rstd = normal_row(z, inside, width, eps)
    y = normal * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if p > 0:
        y = tl.where(stays(seed, at, p), y / (1.0 - p), 0.0)

    tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(
    do_not_specialize=["seed"], do_not_specialize_on_alignment=["positions_ptr", "types_ptr"]
)
def _embed_text_forward(
    words_ptr,
    positions_ptr,
    types_ptr,
    position_table_ptr,
    type_table_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    width,
    p,
    eps,
    seed,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    z = tl.load(words_ptr + row.to(tl.int64) * width + column, mask=inside, other=0.0).to(
        tl.float32
    )
    z += tl.load(
        position_table_ptr + tl.load(positions_ptr + row) * width + column, mask=inside, other=0.0
    ).to(tl.float32)
    z += tl.load(
        type_table_ptr + tl.load(types_ptr + row) * width + column, mask=inside, other=0.0
    ).to(tl.float32)
    _normalise(
        z,
        row,
        column,
        inside,
        weight_ptr,
        bias_ptr,
        z_ptr,
        y_ptr,
        mean_ptr,
        rstd_ptr,
        width,
        p,
        eps,
        seed,
    )


@triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["locations_ptr"])
def _embed_image_forward(
    projected_ptr,
    locations_ptr,
    location_weight_ptr,
    location_bias_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    width,
    p,
    eps,
    seed,
    LOCATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    z = tl.load(projected_ptr + row.to(tl.int64) * width + column, mask=inside, other=0.0).to(
        tl.float32
    )
    z += tl.load(location_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)

    for number in tl.static_range(LOCATION):
        place = tl.load(locations_ptr + row * LOCATION + number).to(tl.float32)
        z += place * tl.load(
            location_weight_ptr + column * LOCATION + number, mask=inside, other=0.0
        ).to(tl.float32)

    _normalise(
        z,
        row,
        column,
        inside,
        weight_ptr,
        bias_ptr,
        z_ptr,
        y_ptr,
        mean_ptr,
        rstd_ptr,
        width,
        p,
        eps,
        seed,
    )


@triton.jit(do_not_specialize=["rows", "seed"])
def _embed_backward(
    dy_ptr,
    z_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dz_ptr,
    partial_ptr,
    rows,
    width,
    p,
    seed,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    dbias = tl.zeros([BLOCK], dtype=tl.float32)

    for row in range(program, rows, programs):
        at = row * width + column
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if p > 0:
            dy = tl.where(stays(seed, at, p), dy / (1.0 - p), 0.0)

        rstd = tl.load(rstd_ptr + row)
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normal = tl.where(inside, (z - tl.load(mean_ptr + row)) * rstd, 0.0)
        dz = through_norm(dy, weight, normal, rstd, width)
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        dweight += dy * normal
        dbias += dy

    tl.store(partial_ptr + program * width + column, dweight, mask=inside)
    tl.store(partial_ptr + (programs + program) * width + column, dbias, mask=inside)


def _begin(
    ctx: Any,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    p: float,
    eps: float,
    seed: int,
) -> tuple:
    """Return (result, grid, last arguments of a forward kernel, what its backward pass needs)."""
    z = torch.empty_like(rows)
    y = torch.empty_like(rows)
    mean, rstd = (torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(2))
    width = rows.shape[1]
    ctx.p = p
    ctx.seed = seed

    return (
        y,
        (len(rows),),
        (weight, bias, z, y, mean, rstd, width, p, eps, seed),
        (z, weight, mean, rstd),
    )


def _gradients(
    ctx: Any,
    dy: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple:
    """Return the gradients of (the sum before the norm, the norm's weight, its bias)."""
    rows, width = z.shape
    programs = min(rows, MAX_PROGRAMS)
    dz = torch.empty_like(z)
    partial = torch.empty(2, programs, width, dtype=torch.float32, device=z.device)
    _embed_backward[(programs,)](
        dy.contiguous(),
        z,
        weight,
        mean,
        rstd,
        dz,
        partial,
        rows,
        width,
        ctx.p,
        ctx.seed,
        BLOCK=triton.next_power_of_2(width),
    )

    return dz, *partial.sum(dim=1).to(weight.dtype)


class _EmbedText(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        words: torch.Tensor,
        positions: torch.Tensor,
        types: torch.Tensor,
        position_table: torch.Tensor,
        type_table: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        p: float,
        eps: float,
        seed: int,
    ) -> torch.Tensor:
        """Save the sum before the norm, mean and 1 / deviation of each row, and the row numbers of
        both tables.
        """
        words = words.contiguous()
        y, grid, rest, norm = _begin(ctx, words, weight, bias, p, eps, seed)
        _embed_text_forward[grid](
            words,
            positions,
            types,
            position_table,
            type_table,
            *rest,
            BLOCK=triton.next_power_of_2(words.shape[1]),
        )
        ctx.save_for_backward(positions, types, *norm)
        ctx.sizes = len(position_table), len(type_table)

        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        positions, types, *norm = ctx.saved_tensors
        dz, dweight, dbias = _gradients(ctx, dy, *norm)
        tables = [
            torch.ops.aten.embedding_dense_backward(dz, index, size, -1, False)
            for index, size in zip((positions, types), ctx.sizes, strict=True)
        ]

        return dz, None, None, *tables, dweight, dbias, None, None, None


class _EmbedImage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: torch.Tensor,
        locations: torch.Tensor,
        location_weight: torch.Tensor,
        location_bias: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        p: float,
        eps: float,
        seed: int,
    ) -> torch.Tensor:
        """Save the sum before the norm, mean and 1 / deviation of each row, and the locations."""
        projected = projected.contiguous()
        locations = locations.contiguous()
        y, grid, rest, norm = _begin(ctx, projected, weight, bias, p, eps, seed)
        _embed_image_forward[grid](
            projected,
            locations,
            location_weight,
            location_bias,
            *rest,
            LOCATION=LOCATION,
            BLOCK=triton.next_power_of_2(projected.shape[1]),
        )
        ctx.save_for_backward(locations, *norm)

        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the projected features, the location's weight and bias, and the
        norm's.
        """
        locations, *norm = ctx.saved_tensors
        dz, dweight, dbias = _gradients(ctx, dy, *norm)
        dlocation = dz.t() @ locations.to(dz.dtype)

        return (
            dz,
            None,
            dlocation,
            dz.sum(dim=0, dtype=torch.float32).to(dz.dtype),
            dweight,
            dbias,
            None,
            None,
            None,
        )


def embed_text(
    words: torch.Tensor,
    positions: torch.Tensor,
    types: torch.Tensor,
    position_table: torch.Tensor,
    type_table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dropout_p: float,
    eps: float,
) -> torch.Tensor:
    """See plain.embed_text."""
    if len(words) == 0:
        return words

    return _EmbedText.apply(
        words,
        positions,
        types,
        position_table,
        type_table,
        weight,
        bias,
        dropout_p,
        eps,
        draw_seed(dropout_p),
    )


def embed_image(
    projected: torch.Tensor,
    locations: torch.Tensor,
    location_weight: torch.Tensor,
    location_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dropout_p: float,
    eps: float,
) -> torch.Tensor:
    """See plain.embed_image; locations get no gradient."""
    seed = draw_seed(dropout_p)
    return _EmbedImage.apply(
        projected, locations, location_weight, location_bias, weight, bias, dropout_p, eps, seed
    )
