"""Decide the order of samples, as a pure function of seed and position.

The captions of each store, in its own order, are cut into P contiguous partitions. Position i of an
epoch takes the next sample of partition i mod P. Data-parallel rank r of D takes the positions i =
r (mod D). If D divides P these are exactly the samples of the partitions p = r (mod D): a rank
reads only those, and the global batches are the same for every D. The whole state is one integer,
the number of samples consumed so far.

Each store is an endless stream of shuffled passes over itself. An epoch takes the next `epochs`
passes (fractions are allowed) of every store and shuffles them together, partition by partition, so
all samples of a store are used equally often over time.

If lengths are given, samples of similar length share a batch: in each window of 256 rounds over the
partitions, every partition sorts its samples by length, and all follow the same shuffled order of
places. So the ranks of a global batch get nearly the same number of tokens, however many there are,
and each still reads only its own partitions.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from megatron_interbert.data.randomness import CounterRandom
from megatron_interbert.errors import UsageError

# purpose tags of CounterRandom
SHUFFLE = 1
MIX = 5
WINDOW = 6
WINDOW_ROUNDS = 256
STORE = 1 << 32  # keeps the keys of different stores apart


class SampleOrder:
    """Represent the endless stream of (pass, sample) pairs over `parts`, one array of sample ids
    for each store.

    `epochs`: passes over each store in one epoch (default 1). `lengths`: tokens of every sample id,
    to balance ranks.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        partitions: int,
        seed: int,
        epochs: Sequence[float] | None = None,
        lengths: np.ndarray | None = None,
    ) -> None:
        for samples in parts:
            if len(samples) < partitions:
                raise UsageError(
                    f"--data-partitions {partitions} is more than the {len(samples)} captions to"
                    " train on; give --data-partitions"
                    f" {1 << (max(len(samples), 1).bit_length() - 1)} or less"
                )

        self.parts = list(parts)
        self.partitions = partitions
        self.seed = seed
        self.lengths = lengths
        self.bounds = [
            np.linspace(0, len(samples), partitions + 1).astype(np.int64) for samples in parts
        ]
        # the shuffled tail of each partition is dropped, so other samples in each pass
        self.per_pass = [len(samples) // partitions for samples in parts]
        passes = epochs or [1.0] * len(self.parts)
        self.per_epoch = [max(1, round(e * n)) for e, n in zip(passes, self.per_pass, strict=True)]
        self.per_partition = sum(self.per_epoch)
        self.epoch_length = self.per_partition * partitions
        self._remember()

    def _remember(self) -> None:
        self._epoch_of = lru_cache(maxsize=2 * self.partitions)(self._make_epoch)

    def _pass(self, store: int, number: int, partition: int) -> np.ndarray:
        """Return the samples of one pass over one partition of a store, shuffled."""
        start, stop = self.bounds[store][partition : partition + 2]
        order = CounterRandom(self.seed, SHUFFLE, number, partition + store * STORE).permutation(
            int(stop - start)
        )

        return self.parts[store][start + order][: self.per_pass[store]]

    def _make_epoch(self, epoch: int, partition: int) -> np.ndarray:
        """Build the (pass, sample) pairs of one partition in one epoch, int64 [per_partition, 2].

        They are in the order in which they are used.
        """
        taken = []

        for store, (count, per_pass) in enumerate(zip(self.per_epoch, self.per_pass, strict=True)):
            number, place = np.divmod(np.arange(epoch * count, (epoch + 1) * count), per_pass)
            samples = np.empty(count, np.int64)
            for one in np.unique(number):
                samples[number == one] = self._pass(store, int(one), partition)[
                    place[number == one]
                ]

            taken.append(np.stack([number, samples], axis=1))

        pairs = np.concatenate(taken)
        if len(taken) > 1:
            pairs = pairs[CounterRandom(self.seed, MIX, epoch, partition).permutation(len(pairs))]

        return pairs if self.lengths is None else pairs[self._balanced(pairs[:, 1], epoch)]

    def _balanced(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        order = np.empty(len(samples), np.int64)
        for start in range(0, len(samples), WINDOW_ROUNDS):
            by_length = np.argsort(
                self.lengths[samples[start : start + WINDOW_ROUNDS]], kind="stable"
            )
            order[start : start + len(by_length)] = (
                start
                + by_length[
                    CounterRandom(self.seed, WINDOW, epoch, start).permutation(len(by_length))
                ]
            )

        return order

    def at(self, position: int) -> tuple[int, int]:
        """Return (pass, sample id) at a position of the endless stream.

        The pass equals the epoch if the store is read once per epoch.
        """
        epoch, inside = divmod(position, self.epoch_length)
        index, partition = divmod(inside, self.partitions)
        number, sample = self._epoch_of(epoch, partition)[index]

        return int(number), int(sample)

    def pairs(self, positions: Sequence[int], step_start: int) -> list[tuple[int, ...]]:
        """Return (pass, sample id) at positions of one optimizer step, which begins at position
        `step_start`.
        """
        return [self.at(position) for position in positions]

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_epoch_of"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._remember()


class StepOrder(SampleOrder):
    """Represent the same order with pairs (first position of the optimizer step, sample), for
    samples that share something with all others of their step.
    """

    def pairs(self, positions: Sequence[int], step_start: int) -> list[tuple[int, ...]]:
        return [(step_start, self.at(position)[1]) for position in positions]


class SteppedOrder(SampleOrder):
    """Represent the same order with (pass, sample, first position of the optimizer step), for
    samples that are made in another way in each step.
    """

    def pairs(self, positions: Sequence[int], step_start: int) -> list[tuple[int, ...]]:
        return [(*self.at(position), step_start) for position in positions]


def epochs_from_weights(weights: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Return the passes over each store with which they share an epoch of sum(sizes) samples in
    the proportions of `weights`.
    """
    share = np.array(weights, dtype=np.float64) / sum(weights)
    return (share * sum(sizes) / np.array(sizes)).tolist()


class MicroBatches:
    """Iterate over the positions of the micro-batches of one data-parallel rank, starting after
    `consumed` samples.
    """

    def __init__(
        self, consumed: int, global_batch: int, micro_batch: int, rank: int, ranks: int
    ) -> None:
        self.consumed = consumed
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.ranks = ranks

    def __iter__(self) -> Iterator[list[int]]:
        start = self.consumed
        while True:
            mine = range(
                start + (self.rank - start) % self.ranks, start + self.global_batch, self.ranks
            )
            for first in range(0, len(mine), self.micro_batch):
                yield list(mine[first : first + self.micro_batch])
            start += self.global_batch

    def step_start(self, position: int) -> int:
        """Return the first position of the optimizer step that a position belongs to."""
        return position - (position - self.consumed) % self.global_batch


def check_partitions(told: str, partitions: int, data_parallel_size: int) -> None:
    """Raise UsageError unless the data-parallel size divides the number of partitions.

    `told` names that number and where it comes from, for the message.
    """
    if partitions % data_parallel_size:
        raise UsageError(
            f"data-parallel size {data_parallel_size} does not divide {told};"
            " start another number of processes, or a new run with another --data-partitions"
        )
