"""Choose the kernel of each operation, once at start, from the device and `--kernels`."""

import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_interbert.errors import UsageError
from megatron_interbert.kernels import attention, cpu_ops, plain
from megatron_interbert.kernels.fit import OLDEST, WIDEST, Gpu, gpu_of, tile_bytes, tile_for
from megatron_interbert.kernels.grouped import OneByOne, Together
from megatron_interbert.kernels.products import (
    Float8Products,
    PlainProducts,
    WideProducts,
    has_bfloat16_products,
    has_scaled_products,
)

ROW_MULTIPLE = 32


@dataclass(frozen=True)
class Kernels:
    """Hold operations with the signatures of `plain`, and remarks about their choice."""

    attention: Callable[..., torch.Tensor] = attention.padded_sdpa
    bias_gelu: Callable[..., torch.Tensor] = plain.bias_gelu
    dropout_add_norm: Callable[..., torch.Tensor] = plain.dropout_add_norm
    region_rows: Callable[..., torch.Tensor] = plain.region_rows
    embed_text: Callable[..., torch.Tensor] = plain.embed_text
    embed_image: Callable[..., torch.Tensor] = plain.embed_image
    vocab_statistics: Callable[..., tuple[torch.Tensor, ...]] = plain.vocab_statistics
    vocab_gradient: Callable[..., torch.Tensor] = plain.vocab_gradient
    products: type = PlainProducts
    grouped: type = OneByOne  # products of experts
    row_multiple: int = 1  # token rows of a stack of layers are padded to a multiple of this
    remarks: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        """Return whether the kernels are Triton's, which keep less for the backward pass than
        torch's.
        """
        return self.bias_gelu is not plain.bias_gelu

    def describe(self) -> str:
        """Return one line: operation=module.function of each, then remarks about the choice."""
        operations = {name: one for name, one in vars(self).items() if callable(one)}
        chosen = ", ".join(
            f"{name}={one.__module__.rsplit('.', 1)[-1]}.{one.__name__}"
            for name, one in operations.items()
        )

        return "; ".join([chosen, *self.remarks])


def choose_kernels(
    name: str,
    device: torch.device,
    attention_dropout: bool = False,
    deterministic: bool = False,
    fp8: bool = False,
    head_sizes: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Kernels:
    """Return the kernels for `--kernels auto|torch|triton|apex` on a device.

    With `fp8` the layers' products are in 8 bits (on a CPU too, but slowly, for checks). Remarks
    about attention are for `head_sizes` in `dtype`; the kernels themselves adapt to their inputs.
    Raises UsageError if the choice cannot run on the device.
    """
    kernels = _kernels_by_name(name, device, attention_dropout, deterministic, dtype)
    if fp8:
        check_float8(device)
        kernels = replace(kernels, products=Float8Products)
    elif has_grouped_product(device, dtype):
        kernels = replace(kernels, grouped=Together)

    if not kernels.fused or device.type != "cuda":  # not Triton's, or in its interpreter
        return kernels

    remarks = attention_remarks(head_sizes, dtype, gpu_of(device))
    if kernels.attention.__name__ == "flash_attention" and dtype.itemsize == 2:
        remarks = ["torch's flash attention, because there is no dropout"]

    return replace(kernels, remarks=(*kernels.remarks, *remarks))


def has_grouped_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Check whether a device multiplies the rows of all experts in one launch, in bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return hasattr(F, "grouped_mm") and not gpu_of(device).is_too_old


def check_float8(device: torch.device) -> None:
    """Raise UsageError if torch or the device has no products in 8 bits."""
    if not has_scaled_products():
        raise UsageError(
            f"--fp8: torch {torch.__version__} has no torch.nn.functional.scaled_mm; install torch"
            " 2.13 or leave --fp8 out"
        )

    amd = torch.version.hip is not None  # AMD numbers capabilities differently
    if device.type == "cuda" and (amd or torch.cuda.get_device_capability(device) < (8, 9)):
        raise UsageError(
            f"--fp8: {torch.cuda.get_device_name(device)} has no 8-bit products, which need Ada,"
            " Hopper or newer; leave it out"
        )


def attention_remarks(head_sizes: Sequence[int], dtype: torch.dtype, gpu: Gpu) -> list[str]:
    """Return remarks on how Triton's attention computes heads of these sizes on a GPU."""
    remarks = []
    kind = str(dtype).removeprefix("torch.")

    for head in sorted(set(head_sizes)):
        tile = tile_for(head, dtype, gpu.shared_memory)
        room = f"{gpu.shared_memory / 1024:.0f} KiB of shared memory a block"

        if tile is not None:
            needed = tile_bytes(tile, head, dtype.itemsize) / 1024
            remarks.append(
                f"heads of {head} in {kind}: tiles of {tile} tokens, {needed:.0f} of {room}"
            )
        elif head > WIDEST:
            remarks.append(
                f"heads of {head}: padded SDPA, as Triton's tiles are at most {WIDEST} wide"
            )
        else:
            remarks.append(
                f"heads of {head} in {kind}: padded SDPA, as no tile of Triton's fits in {room}"
            )

    return remarks


def _kernels_by_name(
    name: str,
    device: torch.device,
    attention_dropout: bool,
    deterministic: bool,
    dtype: torch.dtype,
) -> Kernels:
    """Return the kernels of all operations except the products.

    Variable-length flash attention has no dropout, so with `attention_dropout` (training) Triton's
    kernel takes its place, or padded SDPA without Triton; likewise if gradients must be
    `deterministic`.
    """
    on_gpu = device.type == "cuda"
    if name == "torch":
        return Kernels()
    if name == "auto" and not on_gpu:
        return _cpu_kernels(dtype)

    newer = on_gpu and torch.version.hip is None and not gpu_of(device).is_too_old
    flash = newer and not attention_dropout and not deterministic

    if name == "apex":
        from megatron_interbert.kernels import apex_adapters

        packed_attention = attention.varlen_flash if flash else attention.padded_sdpa
        return Kernels(
            attention=packed_attention, dropout_add_norm=apex_adapters.load_dropout_add_norm()
        )

    hindrance = why_no_triton(device)
    if hindrance and name == "auto":
        return Kernels(remarks=(f"plain torch: {hindrance}",))
    if hindrance:
        raise UsageError(f"--kernels triton: {hindrance}; use --kernels auto")

    return _triton_kernels(flash)


def _cpu_kernels(dtype: torch.dtype) -> Kernels:
    """Return plain torch, except for operations that a CPU does faster in another way.

    In 16 bits torch multiplies by oneDNN, which builds a program for each new number of rows, and
    batches have a different number of tokens at every step: without padding to a multiple, a step
    of the sample model with 8 samples takes half as long again.
    """
    kernels = Kernels(attention=cpu_ops.attention, dropout_add_norm=cpu_ops.dropout_add_norm)
    if dtype.itemsize > 2:
        return kernels
    if not has_bfloat16_products():
        return replace(kernels, products=WideProducts)

    return replace(kernels, row_multiple=ROW_MULTIPLE)


def _triton_kernels(flash: bool) -> Kernels:
    """Return Triton's kernels, with `flash` torch's variable-length flash attention for inputs that
    it can compute.
    """
    from megatron_interbert.kernels import (
        triton_attention,
        triton_embedding,
        triton_ops,
        triton_vocab,
    )

    return Kernels(
        triton_attention.flash_attention if flash else triton_attention.packed_attention,
        triton_ops.bias_gelu,
        triton_ops.dropout_add_norm,
        triton_embedding.region_rows,
        triton_embedding.embed_text,
        triton_embedding.embed_image,
        triton_vocab.vocab_statistics,
        triton_vocab.vocab_gradient,
    )


def why_no_triton(device: torch.device) -> str | None:
    """Return why Triton's kernels cannot run on a device; None if they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"

    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return (
            "a CPU runs Triton's kernels only in its interpreter, for checks (TRITON_INTERPRET=1)"
        )

    if torch.version.hip is not None:
        return "the kernels are for NVIDIA's GPUs, and this torch is a build for AMD's (ROCm)"

    gpu = gpu_of(device)
    if gpu.is_too_old:
        return (
            f"{gpu} is older than Triton's kernels and flash attention need"
            f" ({OLDEST[0]}.{OLDEST[1]})"
        )

    if torch.cuda.is_available():
        return why_no_launcher()

    return None


def why_no_launcher() -> str | None:
    """Return what this machine lacks of what Triton builds its launcher with; None if nothing."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return (
            "Triton finds no C compiler to build its launcher with (apt-get install gcc, or set CC)"
        )

    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return (
            f"Triton builds its launcher with {header}, which is missing (apt-get install"
            " python3-dev)"
        )

    return None
