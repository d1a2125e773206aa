"""Draw random numbers as a pure function of a key, so that no worker, rank or restart has state of
its own.

`CounterRandom` draws the numbers of one key; it is built on `Philox.random_raw`, whose stream NumPy
guarantees never to change. `uniforms` draws for many samples at once: Philox 4x32 with 10 rounds
(Salmon et al., 2011), the generator of cuRAND, written with array operations because creating a
NumPy generator for each sample costs more than reading the sample.
"""

from collections.abc import Sequence

import numpy as np

MASK64 = (1 << 64) - 1
MASK32 = np.uint64(0xFFFFFFFF)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


class CounterRandom:
    """Draw the numbers that belong to (seed, purpose, epoch, item), one after another."""

    def __init__(self, seed: int, purpose: int, epoch: int, item: int) -> None:
        self._bits = np.random.Philox(
            key=[seed & MASK64, item & MASK64], counter=[0, 0, epoch & MASK64, purpose & MASK64]
        )

    def uniform(self, count: int) -> np.ndarray:
        """Draw numbers in [0, 1), float64 [count]."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def integer(self, high: int) -> int:
        """Draw one integer in [0, high)."""
        return int(self.uniform(1)[0] * high)

    def permutation(self, count: int) -> np.ndarray:
        """Draw a random order of 0 .. count-1, int64 [count]."""
        return np.argsort(self._bits.random_raw(count), kind="stable")


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Compute Philox 4x32-10 of four counter words (uint64 arrays of one shape, holding 32 bits
    each) and a key of two words; return four such words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    shift = np.uint64(32)

    for _ in range(ROUNDS):
        first = c0 * MULTIPLIERS[0]
        second = c2 * MULTIPLIERS[1]
        c0 = (second >> shift) ^ c1 ^ np.uint64(k0)
        c1 = second & MASK32
        c2 = (first >> shift) ^ c3 ^ np.uint64(k1)
        c3 = first & MASK32
        k0 = (k0 + WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + WEYL[1]) & 0xFFFFFFFF

    return c0, c1, c2, c3


def uniforms(
    seed: int, epochs: np.ndarray, samples: np.ndarray, wanted: Sequence[tuple[int, int, int]]
) -> list[np.ndarray]:
    """Draw numbers in [0, 1) for B epochs and samples: one float64 array [B, count] for each
    (purpose, first, count) wanted.

    A number depends only on (seed, purpose, epoch, sample) and its place, which counts from
    `first`, a multiple of 4.
    """
    blocks = [
        np.arange(first // 4, (first + count + 3) // 4) | purpose << 24
        for purpose, first, count in wanted
    ]
    block = np.concatenate(blocks).astype(np.uint64)
    epoch, sample = (np.asarray(values).astype(np.uint64)[:, None] for values in (epochs, samples))
    shape = (len(sample), len(block))
    counter = [
        np.broadcast_to(word, shape)
        for word in (block, epoch & MASK32, sample & MASK32, sample >> np.uint64(32))
    ]
    words = philox(tuple(counter), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    numbers = np.stack(words, axis=2).reshape(len(sample), 4 * len(block)) * 2.0**-32
    starts = 4 * np.cumsum([0, *(len(b) for b in blocks)])

    return [
        numbers[:, start : start + count]
        for start, (_, _, count) in zip(starts, wanted, strict=False)
    ]
