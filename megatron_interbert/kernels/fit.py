"""What a GPU offers a block of threads, and the tile of the attention kernels that fits in it.

Nothing here needs a GPU or Triton: the table of limits also serves the compilation ahead of time in
tests/campaigns/tiles.py, which holds every tile's real need against `tile_bytes`.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

# compute capability: bfloat16 in the tensor cores, flash attention, Triton's compiler
OLDEST = (8, 0)
WIDEST = 128  # size of a head

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

# Tokens of a tile by the bytes of an element, the best first. In 32 bits products are no tensor
# cores' work: larger tiles spill registers without end.
TILES = {2: (64, 32, 16), 4: (32, 16)}


@dataclass(frozen=True)
class Gpu:
    """A GPU as far as kernels care: its name, compute capability, and the bytes of shared memory
    that a block may take.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int

    @property
    def is_too_old(self) -> bool:
        """Whether neither Triton's kernels nor flash attention run on it."""
        return self.capability < OLDEST

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name} (compute capability {major}.{minor})"


@lru_cache
def gpu_of(device: torch.device) -> Gpu:
    """Give the GPU behind a device; where torch sees none, the oldest that kernels are made for."""
    if not torch.cuda.is_available():
        return Gpu("no GPU here", OLDEST, SHARED_MEMORY[OLDEST])

    facts = torch.cuda.get_device_properties(device)
    known = SHARED_MEMORY.get((facts.major, facts.minor), min(SHARED_MEMORY.values()))
    offered = getattr(facts, "shared_memory_per_block_optin", 0) or getattr(
        facts, "shared_memory_per_block", 0
    )

    return Gpu(facts.name, (facts.major, facts.minor), offered or known)


def tile_width(head: int) -> int:
    """Give columns of the tile that holds a head of this size; matrix products want 16 at least."""
    return max(16, 1 << (head - 1).bit_length())


def tile_bytes(tile: int, head: int, element: int) -> int:
    """Give the most shared memory that an attention kernel takes: four tiles of tokens (q, k, v and
    a gradient), one of scores.
    """
    return (4 * tile * tile_width(head) + tile * tile) * element


def tile_for(head: int, dtype: torch.dtype, shared_memory: int) -> int | None:
    """Tokens of the largest tile that fits for heads of this size.

    None where none does, or the head is too wide.
    """
    if head > WIDEST:
        return None

    fitting = (
        tile
        for tile in TILES.get(dtype.itemsize, ())
        if tile_bytes(tile, head, dtype.itemsize) <= shared_memory
    )

    return next(fitting, None)
