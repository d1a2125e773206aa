"""Random numbers for a model that is not shared out over ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_interbert.parallel.rng import RandomStreams


class TorchStream(RandomStreams):
    """All dropout draws from torch's own generator, so that torch.manual_seed alone governs it.

    The parent seeds that generator when it is made, and keeps a second state for tensor-parallel
    shards; there are none here.
    """

    def __init__(self) -> None:
        self._sharded_state = None

    @contextmanager
    def sharded(self) -> Iterator[None]:
        """Nothing is sharded: continue with the same generator."""
        yield
