"""Provide random numbers for a model that is not split over ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_interbert.parallel.rng import RandomStreams


class TorchStream(RandomStreams):
    """Draw all dropout from torch's own generator, so that torch.manual_seed alone controls it.

    The parent class seeds that generator on construction, and keeps a second state for
    tensor-parallel shards, of which there are none here.
    """

    def __init__(self) -> None:
        self._sharded_state = None

    @contextmanager
    def sharded(self) -> Iterator[None]:
        """Keep the same generator, because nothing is sharded."""
        yield
