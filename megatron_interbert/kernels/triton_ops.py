"""Compute the memory-bound parts of a layer in Triton: bias + GELU, and bias + dropout + residual +
LayerNorm.

The backward pass redraws dropout masks from (seed, element), so none is kept. Parameter gradients
are summed per program and then over programs, always in the same order. TRITON_INTERPRET=1 runs the
kernels on a CPU, for checking only.

Triton compiles a kernel again for each type, alignment and divisibility by 16 of its arguments.
Numbers that vary from batch to batch (rows, seeds) are therefore not specialised, and kernels query
the number of programs instead of taking it as an argument.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl

# programs that share the rows of a backward pass; each keeps one partial sum per column
MAX_PROGRAMS = 512
TILE_ROWS = 8
TILE_COLUMNS = 256


def interpreted() -> bool:
    """Check whether Triton's CPU interpreter is turned on."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def draw_seed(dropout_p: float) -> int:
    """Draw the seed of a dropout mask from the CPU generator; 0 without dropout.

    Tensor-parallel ranks have the same state of it (for sharded activations, different ones),
    recomputation restores it, and it needs no synchronisation with the device.
    """
    return int(torch.randint(2**31 - 1, (1,))) if dropout_p > 0 else 0


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_forward(x_ptr, bias_ptr, y_ptr, rows, width, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # written as a multiple of `width`, so that the compiler knows what divides it
    inside = at < rows.to(tl.int64) * width
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + tl.load(
        bias_ptr + at % width, mask=inside, other=0.0
    ).to(tl.float32)
    y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_backward(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of some columns of this program's groups of ROWS rows, and their partial
    sum for the gradient of the bias.
    """
    program = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK], dtype=tl.float32)

    for first in range(program * ROWS, rows, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < width)
        z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        slope = (
            0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
            + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        )
        dx = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * slope
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dbias += tl.sum(dx, axis=0)

    tl.store(partial_ptr + program * width + column, dbias, mask=column < width)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        rows = x.numel() // width
        ctx.save_for_backward(x, bias)
        _bias_gelu_forward[(triton.cdiv(x.numel(), 1024),)](x, bias, y, rows, width, BLOCK=1024)

        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        width = x.shape[-1]
        rows = x.numel() // width
        programs = min(triton.cdiv(rows, TILE_ROWS), MAX_PROGRAMS)
        dx = torch.empty_like(x)
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        _bias_gelu_backward[(triton.cdiv(width, TILE_COLUMNS), programs)](
            dy.contiguous(), x, bias, dx, partial, rows, width, ROWS=TILE_ROWS, BLOCK=TILE_COLUMNS
        )

        return dx, partial.sum(dim=0).to(bias.dtype)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """See plain.bias_gelu."""
    return x + bias if x.numel() == 0 else _BiasGelu.apply(x, bias)


@triton.jit
def stays(seed, at, p):
    """Return whether dropout keeps the elements `at`, a function of the seed and the lower 32 bits
    of their numbers, which make cheap draws and differ enough.
    """
    return tl.rand(seed, at.to(tl.int32)) >= p


@triton.jit
def normal_row(z, inside, width, eps):
    """Return (z with mean 0 and deviation 1, its mean, 1 / its deviation) of a row.

    Elements outside the row stay 0.
    """
    mean = tl.sum(z, axis=0) / width
    centred = tl.where(inside, z - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)

    return centred * rstd, mean, rstd


@triton.jit
def through_norm(dy, weight, normal, rstd, width):
    """Return the gradient of a row before its LayerNorm from the gradient `dy` after it."""
    scaled = dy * weight
    return (
        scaled - tl.sum(scaled, axis=0) / width - normal * tl.sum(scaled * normal, axis=0) / width
    ) * rstd


@triton.jit(do_not_specialize=["seed"])
def _add_norm_forward(
    x_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    norm_bias_ptr,
    sum_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    width,
    p,
    eps,
    seed,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + tl.load(
        bias_ptr + column, mask=inside, other=0.0
    ).to(tl.float32)
    if p > 0:
        x = tl.where(stays(seed, at, p), x / (1.0 - p), 0.0)

    z = x + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normal, mean, rstd = normal_row(z, inside, width, eps)
    y = normal * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(norm_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(sum_ptr + at, z.to(sum_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["rows", "seed"])
def _add_norm_backward(
    dy_ptr,
    sum_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
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
    dnorm_bias = tl.zeros([BLOCK], dtype=tl.float32)
    dbias = tl.zeros([BLOCK], dtype=tl.float32)

    for row in range(program, rows, programs):
        at = row * width + column
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normal = tl.where(inside, (z - tl.load(mean_ptr + row)) * rstd, 0.0)
        dz = through_norm(dy, weight, normal, rstd, width)
        dx = dz
        if p > 0:
            dx = tl.where(stays(seed, at, p), dz / (1.0 - p), 0.0)

        dx = tl.where(inside, dx, 0.0)
        tl.store(dresidual_ptr + at, dz.to(dresidual_ptr.dtype.element_ty), mask=inside)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * normal
        dnorm_bias += dy
        dbias += dx

    tl.store(partial_ptr + program * width + column, dweight, mask=inside)
    tl.store(partial_ptr + (programs + program) * width + column, dnorm_bias, mask=inside)
    tl.store(partial_ptr + (2 * programs + program) * width + column, dbias, mask=inside)


class _DropoutAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        norm_bias: torch.Tensor,
        p: float,
        eps: float,
        seed: int,
    ) -> torch.Tensor:
        """Save the sum before the norm, and mean and 1 / deviation of each row."""
        x = x.contiguous()
        residual = residual.contiguous()
        rows, width = x.shape
        total = torch.empty_like(x)
        y = torch.empty_like(x)
        mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        _add_norm_forward[(rows,)](
            x,
            bias,
            residual,
            weight,
            norm_bias,
            total,
            y,
            mean,
            rstd,
            width,
            p,
            eps,
            seed,
            BLOCK=triton.next_power_of_2(width),
        )
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.p = p
        ctx.seed = seed

        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients, those of parameters summed per program, then over programs."""
        total, weight, mean, rstd = ctx.saved_tensors
        rows, width = total.shape
        programs = min(rows, MAX_PROGRAMS)
        dx = torch.empty_like(total)
        dresidual = torch.empty_like(total)
        partial = torch.empty(3, programs, width, dtype=torch.float32, device=dy.device)
        _add_norm_backward[(programs,)](
            dy.contiguous(),
            total,
            weight,
            mean,
            rstd,
            dx,
            dresidual,
            partial,
            rows,
            width,
            ctx.p,
            ctx.seed,
            BLOCK=triton.next_power_of_2(width),
        )
        dweight, dnorm_bias, dbias = partial.sum(dim=1).to(weight.dtype)

        return dx, dbias, dresidual, dweight, dnorm_bias, None, None, None


def dropout_add_norm(
    x: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    dropout_p: float,
    eps: float,
) -> torch.Tensor:
    """See plain.dropout_add_norm."""
    if x.shape[0] == 0:
        return x
    return _DropoutAddNorm.apply(
        x, bias, residual, weight, norm_bias, dropout_p, eps, draw_seed(dropout_p)
    )
