"""Compile the Triton kernels ahead of time for GPUs that are not here: what a program takes, and
whether it spills registers.
"""

import inspect
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from megatron_interbert.kernels import triton_attention, triton_embedding, triton_ops, triton_vocab

MODULES = (triton_ops, triton_attention, triton_embedding, triton_vocab)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

ATTENTION = ("_row_forward", "_row_backward", "_tiled_forward", "_tiled_backward")
SIZES = {"BLOCK": 1024, "ROWS": triton_ops.TILE_ROWS, "LOCATION": triton_embedding.LOCATION}

# Arguments by name: those not of the element type, and those always divisible by 16.
REALS = ("p", "eps", "scale")
POINTERS = {
    **dict.fromkeys(
        ("mean_ptr", "rstd_ptr", "partial_ptr", "largest_ptr", "total_ptr", "own_ptr"), "*fp32"
    ),
    **dict.fromkeys(("normaliser_ptr", "grad_ptr"), "*fp32"),
    **dict.fromkeys(
        ("labels_ptr", "best_ptr", "positions_ptr", "types_ptr", "summary_ptr", "starts_ptr"),
        "*i64",
    ),
    "offsets_ptr": "*i32",
    "shown_ptr": "*i1",
}
DIVISIBLE = ("width", "columns")


@dataclass(frozen=True)
class Compiled:
    """Hold a compiled kernel's shared memory per program and stack (spilled registers) per thread,
    in bytes, and the seconds of compilation.
    """

    shared: int
    stack: int
    seconds: float


def launched_kernels() -> list[JITFunction]:
    """Return the kernels that some function launches; all others are parts of these."""
    return [
        kernel
        for module in MODULES
        for kernel in vars(module).values()
        if _is_launched(kernel, module)
    ]


def _is_launched(kernel: object, module: ModuleType) -> bool:
    return isinstance(kernel, JITFunction) and f"{kernel.fn.__name__}[" in inspect.getsource(module)


def compile_attention(
    name: str, capability: tuple[int, int], dtype: torch.dtype, tile: int, width: int
) -> Compiled:
    """Compile one of ATTENTION, with dropout, as it is launched."""
    number = triton_attention.warps(tile, width, dtype.itemsize, name.startswith("_tiled"))
    sizes = {"TILE": tile, "WIDTH": width, "DROPOUT": True}
    return compile_kernel(getattr(triton_attention, name), capability, dtype, sizes, number)


def compile_kernel(
    kernel: JITFunction,
    capability: tuple[int, int],
    dtype: torch.dtype,
    sizes: dict[str, int] = SIZES,
    warps: int = 4,
) -> Compiled:
    """Compile a kernel for a compute capability, with tensors of `dtype`; `sizes` are its constants
    by name.
    """
    types = {name: _argument_type(name, DTYPES[dtype]) for name in kernel.arg_names}
    constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
    aligned = [name for name in kernel.arg_names if name.endswith("_ptr") or name in DIVISIBLE]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    began = time.monotonic()
    source = ASTSource(kernel, types, constants, hints)
    made = compile(source, target=target, options={"num_warps": warps, "num_stages": 1})

    return Compiled(made.metadata.shared, _stack(made.asm["cubin"]), time.monotonic() - began)


def _argument_type(name: str, element: str) -> str:
    if name.isupper():
        return "constexpr"
    if name.endswith("_ptr"):
        return POINTERS.get(name, f"*{element}")
    return "fp32" if name in REALS else "i32"


def _stack(machine_code: bytes) -> int:
    """Return a thread's bytes of stack, as reported by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout

    return int(re.search(r"STACK:(\d+)", told)[1])
