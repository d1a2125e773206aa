"""Provide two random streams for dropout, and recomputation that replays both.

Replicated activations draw from torch's default generator, seeded the same on all ranks of a
tensor-parallel group; sharded ones draw inside `RandomStreams.sharded()`, seeded differently. Both
are reseeded from (seed, step) at every step, so there is no state to save: a resumed step draws
what the uninterrupted one would have drawn.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint


class RandomStreams:
    """Hold the sharded stream of one device; the replicated one is torch's default generator.

    `data_rank` and `tensor_rank` make ranks differ where they must. `alone`: there is only one
    tensor-parallel rank, so one stream serves as both and no generator state is swapped.
    """

    def __init__(
        self,
        seed: int,
        data_rank: int = 0,
        tensor_rank: int = 0,
        device: torch.device | str = "cpu",
        alone: bool = False,
    ) -> None:
        self.seed = seed
        self.data_rank = data_rank
        self.tensor_rank = tensor_rank
        self.alone = alone
        self.on_gpu = torch.device(device).type == "cuda"
        self.start_step(0)

    def start_step(self, step: int) -> None:
        """Reseed both streams for an optimizer step."""
        replicated = np.random.SeedSequence([self.seed, step, self.data_rank]).generate_state(
            1, np.uint64
        )[0]
        sharded = np.random.SeedSequence(
            [self.seed, step, self.data_rank, self.tensor_rank + 1]
        ).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(sharded))
        self._sharded_state = self._read()
        torch.manual_seed(int(replicated))

    def _read(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return generator states: the host's, from which our kernels draw seeds, and the GPU's."""
        return torch.get_rng_state(), torch.cuda.get_rng_state() if self.on_gpu else None

    def _write(self, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if self.on_gpu:
            torch.cuda.set_rng_state(state[1])

    @contextmanager
    def sharded(self) -> Iterator[None]:
        """Draw random numbers inside that differ between the ranks of a tensor-parallel group."""
        if self.alone:
            yield
            return

        replicated = self._read()
        self._write(self._sharded_state)

        try:
            yield
        finally:
            self._sharded_state = self._read()
            self._write(replicated)

    @contextmanager
    def _remember(self, memory: dict[str, Any]) -> Iterator[None]:
        memory["sharded"] = self._sharded_state
        yield

    @contextmanager
    def _replay(self, memory: dict[str, Any]) -> Iterator[None]:
        later = self._sharded_state
        self._sharded_state = memory["sharded"]
        try:
            yield
        finally:
            self._sharded_state = later

    def recompute(self, function: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
        """Return function(*inputs); its activations are recomputed in the backward pass, with the
        dropout of both streams replayed.
        """
        memory: dict[str, Any] = {}
        return checkpoint(
            function,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=True,
            context_fn=lambda: (self._remember(memory), self._replay(memory)),
        )
