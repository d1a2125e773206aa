"""Choose the tile of the attention kernels that fits the shared memory of a GPU.

Nothing here needs a GPU or Triton: tests/campaigns/tiles.py, which compiles ahead of time, uses the
table of limits too, and compares what every tile really takes with `tile_bytes`.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

# compute capability needed by bfloat16 in tensor cores, flash attention and Triton's compiler
OLDEST = (8, 0)
WIDEST = 128  # largest head size

# Bytes of shared memory that a block may ask for, by compute capability (CUDA C++ Programming
# Guide, technical specifications).
SHARED_MEMORY = {
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (12, 0): 101376,
}

# Tokens of a tile by the bytes of an element, the best first. In 32 bits products do not run on
# tensor cores, and larger tiles would spill many registers.
TILES = {2: (64, 32, 16), 4: (32, 16)}


@dataclass(frozen=True)
class Gpu:
    """Hold what kernels need to know of a GPU: its name, compute capability, and the bytes of
    shared memory that a block may take.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int

    @property
    def is_too_old(self) -> bool:
        """Return whether the GPU is too old for Triton's kernels and flash attention."""
        return self.capability < OLDEST

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name} (compute capability {major}.{minor})"


@lru_cache
def gpu_of(device: torch.device) -> Gpu:
    """Return the GPU of a device; if torch sees none, the oldest that the kernels support."""
    if not torch.cuda.is_available():
        return Gpu("no GPU here", OLDEST, SHARED_MEMORY[OLDEST])

    facts = torch.cuda.get_device_properties(device)
    known = SHARED_MEMORY.get((facts.major, facts.minor), min(SHARED_MEMORY.values()))
    offered = getattr(facts, "shared_memory_per_block_optin", 0) or getattr(
        facts, "shared_memory_per_block", 0
    )

    return Gpu(facts.name, (facts.major, facts.minor), offered or known)


def tile_width(head: int) -> int:
    """Return the columns of the tile for a head of this size; matrix products need at least 16."""
    return max(16, 1 << (head - 1).bit_length())


def tile_bytes(tile: int, head: int, element: int) -> int:
    """Return the most shared memory in bytes that an attention kernel takes: four tiles of tokens
    (q, k, v and a gradient) and one of scores.
    """
    return (4 * tile * tile_width(head) + tile * tile) * element


def tile_for(head: int, dtype: torch.dtype, shared_memory: int) -> int | None:
    """Return the tokens of the largest tile that fits for heads of this size.

    None if no tile fits, or the head is too wide.
    """
    if head > WIDEST:
        return None

    fitting = (
        tile
        for tile in TILES.get(dtype.itemsize, ())
        if tile_bytes(tile, head, dtype.itemsize) <= shared_memory
    )

    return next(fitting, None)
