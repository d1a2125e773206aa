"""Count the samples of a file that cannot be used, with reasons."""

from collections import Counter


class Drops:
    """Count dropped samples by reason, and keep the first of each.

    A reason holds no details of its sample, because samples are counted by it.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def __len__(self) -> int:
        return sum(self.counts.values())

    def add(self, reason: str, sample: str) -> None:
        """Count a sample."""
        self.counts[reason] += 1
        self.first.setdefault(reason, sample)

    def take(self, other: "Drops") -> None:
        """Count what another has counted as well."""
        self.counts.update(other.counts)
        self.first = {**other.first, **self.first}

    def __str__(self) -> str:
        """Return text to append to a line, such as `; dropped 3: REASON (first: train-7)`."""
        return "".join(
            f"; dropped {count}: {reason} (first: {self.first[reason]})"
            for reason, count in self.counts.items()
        )
