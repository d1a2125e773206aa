"""The Triton kernels without a GPU: they compute what their twins do, and the compiler makes machine code of them for sm_90."""

import os
import subprocess
import sys

import pytest

from tests.launching import ROOT

pytest.importorskip("triton", reason="triton is not installed (pip install -r requirements.txt)")

COMPILE = """
import inspect
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction
from megatron_interbert.kernels import triton_attention, triton_embedding, triton_ops, triton_vocab

BLOCKS = {"BLOCK": 1024, "PROGRAMS": 64, "ROWS": 8, "LENGTH": 64, "WIDTH": 64, "DROPOUT": True, "LOCATION": 5}
REALS = ("p", "eps", "scale")
FLOATS = ("mean_ptr", "rstd_ptr", "partial_ptr", "largest_ptr", "total_ptr", "own_ptr", "normaliser_ptr", "grad_ptr")
WHOLE = ("labels_ptr", "best_ptr", "positions_ptr", "types_ptr", "summary_ptr", "starts_ptr")
made = 0
for module in (triton_ops, triton_attention, triton_embedding, triton_vocab):
    for kernel in vars(module).values():
        if not isinstance(kernel, JITFunction) or f"{kernel.fn.__name__}[" not in inspect.getsource(module):
            continue  # a part of others
        for element in ("*bf16", "*fp32"):
            types = {}
            for name in kernel.arg_names:
                pointer = "*i64" if name in WHOLE else "*fp32" if name in FLOATS else element
                pointer = {"offsets_ptr": "*i32", "shown_ptr": "*i1"}.get(name, pointer)
                types[name] = pointer if name.endswith("_ptr") else "constexpr" if name in BLOCKS else "fp32" if name in REALS else "i32"
            constants = {name: BLOCKS[name] for name in kernel.arg_names if name in BLOCKS}
            compiled = compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
            assert len(compiled.asm["cubin"]) > 1000
            made += 1
print(f"compiled {made}")
"""


def test_they_equal_their_twins_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted.py"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert result.returncode == 0, result.stdout[-5000:]


def test_they_compile_for_sm_90(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert "compiled 24" in result.stdout, result.stderr[-3000:]
