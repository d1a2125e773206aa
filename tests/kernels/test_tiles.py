"""Run a short form of tests/campaigns/tiles.py: compile some tiles for GPUs that are not here, and
compare its table with the code.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install -r requirements.txt)")

import triton

from megatron_interbert.kernels.fit import SHARED_MEMORY, TILES, tile_bytes, tile_for
from tests.campaigns import tiles
from tests.kernels.compiling import ATTENTION, compile_attention, compile_kernel, launched_kernels


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def committed() -> tuple[str, list[list[str]]]:
    """Return (version of Triton that made the tables, cells of the rows of tiles)."""
    text = tiles.DOCUMENT.read_text().split(tiles.BEGIN)[1].split(tiles.END)[0]
    version = text.split("with Triton ")[1].split(" ")[0]
    rows = [
        line.strip("| ").split(" | ")
        for line in text.splitlines()
        if line.startswith(tuple(f"| {major}." for major in range(8, 20)))
    ]

    return version, [[cell.strip() for cell in row] for row in rows]


def test_the_table_says_what_the_code_does():
    _, rows = committed()
    expected = [tiles.known(*choice) for choice in tiles.choices()]
    assert [(row[:5], row[7:]) for row in rows] == expected


def test_one_tile_is_taken_for_every_card_and_type():
    for capability, limit in SHARED_MEMORY.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for head in (8, 32, 64, 96, 128):
                assert tile_for(head, dtype, limit) == TILES[dtype.itemsize][0], (
                    capability,
                    dtype,
                    head,
                )


@pytest.mark.parametrize(
    ("capability", "dtype", "head", "tile"),
    [
        ((8, 0), torch.float32, 96, 32),
        ((9, 0), torch.bfloat16, 64, 64),
        ((12, 0), torch.bfloat16, 96, 64),
    ],
)
def test_tiles_fit_and_spill_little(capability, dtype, head, tile):
    row, wrong = tiles.compiled_row(capability, dtype, head, tile)
    assert not wrong
    version, rows = committed()
    if version == triton.__version__:
        assert row in [tiles.line(cells) for cells in rows]


def test_narrow_tiles_and_short_ones():
    """Check heads and tiles of 16, the smallest that a product takes."""
    for name in ATTENTION:
        made = compile_attention(name, (9, 0), torch.float16, 16, 16)
        assert made.shared <= tile_bytes(16, 16, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_other_kernels_compile(dtype):
    others = [kernel for kernel in launched_kernels() if kernel.fn.__name__ not in ATTENTION]
    assert len(others) == 10
    for kernel in others:
        made = compile_kernel(kernel, (9, 0), dtype)
        assert made.shared <= min(SHARED_MEMORY.values()), kernel.fn.__name__
        assert made.stack <= tiles.MOST_STACK, kernel.fn.__name__
