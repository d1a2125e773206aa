"""Compiles every Triton kernel for every kind of card, and compares what it takes with what the
card offers.

    python -m tests.campaigns.tiles --write
    python -m tests.campaigns.tiles --capabilities 8.0 9.0 --dtypes float32

No GPU is needed. All of it takes eight minutes on two cores; a line a row tells how far it is. The
first command writes the tables of docs/kernels.md. It fails where a tile takes more than
`kernels/fit.py` says, or where a thread spills more than a few registers.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from megatron_interbert.kernels.fit import SHARED_MEMORY, TILES, tile_bytes, tile_for

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
BEGIN = "<!-- tiles.py writes from here"
END = "<!-- to here -->"
HEAD_SIZES = (64, 96)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CARDS = {
    (8, 0): "A100",
    (8, 6): "A10, RTX 30",
    (8, 9): "L4, L40S, RTX 40",
    (9, 0): "H100, H200",
    (10, 0): "B200",
    (12, 0): "RTX 50",
}
# bytes of a thread: what does not fit in 255 registers of 4 bytes, at most half as much again
MOST_STACK = 512
COLUMNS = ("card", "type", "head", "tile", "at most", "compiled", "stack", "limit", "")


def choices(
    capabilities: Iterable[tuple[int, int]] = tuple(SHARED_MEMORY),
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Iterator[tuple[tuple[int, int], torch.dtype, int, int]]:
    """(Compute capability, type, size of a head, tokens of a tile) of each row."""
    for capability in capabilities:
        for dtype in dtypes:
            for head in HEAD_SIZES:
                for tile in TILES[dtype.itemsize]:
                    yield capability, dtype, head, tile


def known(
    capability: tuple[int, int], dtype: torch.dtype, head: int, tile: int
) -> tuple[list[str], list[str]]:
    """What a row says without a compiler: (before, behind) the columns of what was compiled."""
    limit = SHARED_MEMORY[capability]
    needed = tile_bytes(tile, head, dtype.itemsize)
    chosen = tile_for(head, dtype, limit)
    verdict = "**taken**" if tile == chosen else "fits"

    if needed > limit:
        verdict = (
            f"does not fit: {chosen} tokens instead"
            if chosen
            else "does not fit: padded SDPA instead"
        )

    card = f"{capability[0]}.{capability[1]} ({CARDS[capability]})"

    return [card, str(dtype).removeprefix("torch."), str(head), str(tile), f"{needed:,}"], [
        f"{limit:,}",
        verdict,
    ]


def compiled_row(
    capability: tuple[int, int], dtype: torch.dtype, head: int, tile: int
) -> tuple[str, list[str]]:
    """(Row of the table, what is wrong with it)."""
    from megatron_interbert.kernels.fit import tile_width
    from tests.kernels.compiling import ATTENTION, compile_attention

    before, behind = known(capability, dtype, head, tile)
    found = {
        name: compile_attention(name, capability, dtype, tile, tile_width(head))
        for name in ATTENTION
    }
    shared = max(one.shared for one in found.values())
    stack = max(one.stack for one in found.values())
    wrong = []
    if shared > tile_bytes(tile, head, dtype.itemsize):
        wrong.append(f"{' '.join(before)}: takes {shared:,} bytes, more than tile_bytes says")
    if stack > MOST_STACK:
        wrong.append(
            f"{' '.join(before)}: spills {stack:,} bytes a thread, expected at most {MOST_STACK}"
        )

    return line([*before, f"{shared:,}", str(stack), *behind]), wrong


def other_kernels(
    capabilities: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...]
) -> tuple[list[str], list[str]]:
    """(Rows of the kernels beside attention, over all cards and types, what is wrong with them)."""
    from tests.kernels.compiling import ATTENTION, compile_kernel, launched_kernels

    rows = []
    wrong = []

    for kernel in launched_kernels():
        name = kernel.fn.__name__
        if name in ATTENTION:
            continue

        found = [
            compile_kernel(kernel, capability, dtype)
            for capability in capabilities
            for dtype in dtypes
        ]
        shared = max(one.shared for one in found)
        stack = max(one.stack for one in found)
        rows.append(line([name.strip("_"), f"{shared:,}", str(stack)]))
        print(rows[-1], flush=True)
        if shared > min(SHARED_MEMORY.values()) or stack > MOST_STACK:
            wrong.append(f"{name}: {shared:,} bytes of shared memory, {stack} of stack")

    return rows, wrong


def line(cells: list[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def head_of(columns: tuple[str, ...]) -> list[str]:
    """The first two lines of a table."""
    return [line(list(columns)), line(["---"] * len(columns))]


def write(rows: list[str], others: list[str]) -> None:
    """Put both tables in their place in the document."""
    import triton

    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN, 1)
    _, behind = rest.split(END, 1)
    tables = [
        f"{BEGIN}, with Triton {triton.__version__} -->",
        "",
        *head_of(COLUMNS),
        *rows,
        "",
        *head_of(("other kernels", "shared memory", "stack")),
        *others,
        "",
        END,
    ]
    DOCUMENT.write_text(before + "\n".join(tables) + behind)


def capability_of(text: str) -> tuple[int, int]:
    """8.9 -> (8, 9)."""
    major, minor = text.split(".")
    found = int(major), int(minor)
    if found not in SHARED_MEMORY:
        raise argparse.ArgumentTypeError(
            f"'{text}': expected one of {', '.join(f'{a}.{b}' for a, b in SHARED_MEMORY)}"
        )

    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--capabilities", nargs="+", type=capability_of, default=list(SHARED_MEMORY), metavar="8.0"
    )
    names = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtypes", nargs="+", choices=names, default=list(names))
    parser.add_argument(
        "--write",
        action="store_true",
        help="write docs/kernels.md (needs all capabilities and types)",
    )
    options = parser.parse_args()
    whole = len(options.capabilities) == len(SHARED_MEMORY) and len(options.dtypes) == len(names)

    if options.write and not whole:
        parser.error(
            "--write needs all capabilities and types: leave --capabilities and --dtypes out"
        )

    dtypes = tuple(getattr(torch, name) for name in options.dtypes)
    began = time.monotonic()
    rows = []
    wrong = []

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing compiled before may stand in
        asked = list(choices(options.capabilities, dtypes))
        for number, row in enumerate(asked, 1):
            text, complaints = compiled_row(*row)
            print(f"{number}/{len(asked)} {time.monotonic() - began:.0f} s {text}", flush=True)
            rows.append(text)
            wrong += complaints

        others, complaints = other_kernels(options.capabilities, dtypes)
        wrong += complaints

    if options.write:
        write(rows, others)

    print(
        "\n".join(wrong)
        or f"all {len(rows)} rows and {len(others)} other kernels fit;"
        f" {time.monotonic() - began:.0f} s"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
