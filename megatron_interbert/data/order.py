"""Which sample comes when: a pure function of (seed, epoch) and nothing else.

The captions of a store, in its own order, are cut into P contiguous partitions. Position i of an epoch takes the next
sample of partition i mod P, each partition being shuffled by itself. A data-parallel rank r of D serves the positions
i = r (mod D). When D divides P these are exactly the samples of the partitions p = r (mod D): a rank reads only those,
and the global batches are the same for every D. The whole state is one integer, the samples consumed so far.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from megatron_interbert.data.randomness import CounterRandom
from megatron_interbert.errors import UsageError

SHUFFLE = 1  # purpose tag of CounterRandom


class SampleOrder:
    """The endless stream of (epoch, sample) pairs over `samples` (int64 [n], the ids of a store to train on)."""

    def __init__(self, samples: np.ndarray, partitions: int, seed: int) -> None:
        if len(samples) < partitions:
            raise UsageError(
                f"--data-partitions {partitions} is more than the {len(samples)} captions to train on;"
                f" give --data-partitions {1 << (max(len(samples), 1).bit_length() - 1)} or less"
            )
        self.samples, self.partitions, self.seed = samples, partitions, seed
        self.bounds = np.linspace(0, len(samples), partitions + 1).astype(np.int64)
        self.per_partition = len(samples) // partitions
        self.epoch_length = self.per_partition * partitions  # the tail is dropped, another one in each epoch
        self._shuffled = lru_cache(maxsize=2 * partitions)(self._shuffle)

    def _shuffle(self, epoch: int, partition: int) -> np.ndarray:
        start, stop = self.bounds[partition], self.bounds[partition + 1]
        order = CounterRandom(self.seed, SHUFFLE, epoch, partition).permutation(int(stop - start))
        return self.samples[start + order]

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample id) at a position of the endless stream."""
        epoch, within = divmod(position, self.epoch_length)
        index, partition = divmod(within, self.partitions)
        return epoch, int(self._shuffled(epoch, partition)[index])

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_shuffled"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._shuffled = lru_cache(maxsize=2 * self.partitions)(self._shuffle)


class MicroBatches:
    """Sampler for one data-parallel rank: positions of its micro-batches, starting after `consumed` samples."""

    def __init__(self, consumed: int, global_batch: int, micro_batch: int, rank: int, ranks: int) -> None:
        self.consumed, self.global_batch, self.micro_batch, self.rank, self.ranks = consumed, global_batch, micro_batch, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        start = self.consumed
        while True:
            mine = range(start + (self.rank - start) % self.ranks, start + self.global_batch, self.ranks)
            for first in range(0, len(mine), self.micro_batch):
                yield list(mine[first : first + self.micro_batch])
            start += self.global_batch


def check_partitions(partitions: int, data_parallel_size: int) -> None:
    """UsageError unless the data-parallel size divides the partitions."""
    if partitions % data_parallel_size:
        raise UsageError(
            f"data-parallel size {data_parallel_size} does not divide --data-partitions {partitions};"
            " start another number of processes, or a new run with another --data-partitions"
        )
