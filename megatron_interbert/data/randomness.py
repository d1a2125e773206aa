"""Random numbers as a pure function of a key, so that no worker, rank or restart has a state of its own.

Built on `Philox.random_raw`, whose stream NumPy guarantees never to change; the methods of `Generator` carry no such promise.
"""

import numpy as np

MASK64 = (1 << 64) - 1


class CounterRandom:
    """The numbers that belong to (seed, purpose, epoch, item), in the order they are drawn."""

    def __init__(self, seed: int, purpose: int, epoch: int, item: int) -> None:
        self._bits = np.random.Philox(key=[seed & MASK64, item & MASK64], counter=[0, 0, epoch & MASK64, purpose & MASK64])

    def uniform(self, count: int) -> np.ndarray:
        """float64 [count] in [0, 1)."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def integer(self, high: int) -> int:
        """One integer in [0, high)."""
        return int(self.uniform(1)[0] * high)

    def permutation(self, count: int) -> np.ndarray:
        """int64 [count], a random order of 0 .. count-1."""
        return np.argsort(self._bits.random_raw(count), kind="stable")
