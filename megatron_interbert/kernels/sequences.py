"""Describe sequences packed end to end in one tensor of tokens, and their padded layout."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Derived = TypeVar("Derived")


class Sequences:
    """Hold B sequences that begin and end at `offsets` (int32 [B+1]); the longest has `longest`
    tokens.

    All layers of a stack attend to the same sequences, so kernels get what they derive from them by
    `once`: the first layer computes it and the others reuse it.
    """

    def __init__(self, offsets: torch.Tensor, longest: int) -> None:
        self.offsets = offsets
        self.longest = longest
        self._derived: dict[tuple[Any, ...], Any] = {}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def once(self, make: Callable[..., Derived], *arguments: Any) -> Derived:
        """Return make(self, *arguments), computed on the first call only."""
        key = (make, *arguments)
        if key not in self._derived:
            self._derived[key] = make(self, *arguments)

        return self._derived[key]


def padded_places(
    sequences: Sequences, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay `tokens` packed rows out in [B, longest].

    Returns the row of each place [B longest], the place of each row [tokens], and which places may
    be attended to [B, longest]. Padding repeats the last real row; nothing attends to it and its
    result is dropped. Boolean indexing is avoided, because the host would wait for the device.
    """
    offsets = sequences.offsets
    lengths = offsets[1:] - offsets[:-1]
    place = torch.arange(sequences.longest, device=offsets.device)
    last = (offsets[1:, None] - 1).clamp(min=0)
    rows = torch.minimum(offsets[:-1, None] + place, last).flatten()

    numbers = torch.arange(len(sequences), device=offsets.device)
    sample = torch.repeat_interleave(numbers, lengths, output_size=tokens)
    within = torch.arange(tokens, device=offsets.device) - offsets[sample]
    slots = sample * sequences.longest + within

    seen = place < lengths[:, None]
    seen[:, 0] = True  # an empty sequence would give NaN, also in the gradient

    return rows, slots, seen
