"""Decide which task each optimizer step trains, as a pure function of the seed, the step and the
evaluations so far.

Round robin visits every task once in each round. Stop-and-go (12-in-1, arXiv 1912.02315): a task
whose figure has not risen by 0.1 % in two evaluations stops, and joins only every fourth round,
until its figure has fallen by 0.5 % from its best. Batches are read ahead, so a decision takes
effect LAG steps after its evaluation, however many loader processes there are.
"""

import math
from collections.abc import Mapping, Sequence

from megatron_interbert.data.randomness import CounterRandom

LAG = 64  # steps
STALE = 2  # evaluations without a gain after which a task stops
GAIN = 1.001
FALL = 0.995
COOLDOWN = 1  # evaluations
GAP = 4  # rounds between two steps of a task that has stopped
DRAW = 11  # purpose tag of CounterRandom


class Pace:
    """Tell whether a task trains in every round, by its evaluations."""

    def __init__(self) -> None:
        self.best = -math.inf
        self.stale = 0
        self.cooling = 0  # evaluations that do not count, after a stop
        self.stopped = False

    def note(self, value: float) -> None:
        """Note an evaluation's figure."""
        if value > self.best * GAIN:
            self.best = value
            self.stale = 0
        else:
            self.stale += 1

        if self.cooling:
            self.cooling -= 1
            self.stale = 0
        if self.stale >= STALE:
            self.stopped = True
            self.cooling = COOLDOWN
            self.stale = 0
        if value < self.best * FALL:
            self.stopped = False  # in the same evaluation: a task that falls never stops


class Schedule:
    """Hold the order of steps over tasks, made as far as it is asked for.

    `weights`: tasks are drawn by these; None: round robin.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        seed: int,
        weights: Sequence[float] | None = None,
        stop_and_go: bool = False,
    ) -> None:
        self.tasks = tuple(tasks)
        self.seed = seed
        self.weights = weights
        self.stop_and_go = stop_and_go
        self.paces = {name: Pace() for name in tasks}
        self.changes: list[tuple[int, frozenset[str]]] = []  # step, tasks that have stopped
        self.steps: list[tuple[int, int]] = []  # number of the task, its earlier steps
        self.earlier = [0] * len(self.tasks)
        self.rounds = 0

    def at(self, step: int) -> tuple[int, int]:
        """Return (number of the task, its earlier steps) of a step, counted from 0."""
        while step >= len(self.steps):
            for number in self._next():
                self.steps.append((number, self.earlier[number]))
                self.earlier[number] += 1

        return self.steps[step]

    def _next(self) -> list[int]:
        if self.weights is not None:
            return [self._drawn(len(self.steps))]

        stopped = self.stopped_at(len(self.steps))
        joins = self.rounds % GAP == 0 or len(stopped) == len(self.tasks)
        self.rounds += 1

        return [number for number, name in enumerate(self.tasks) if joins or name not in stopped]

    def _drawn(self, step: int) -> int:
        mark = CounterRandom(self.seed, DRAW, 0, step).uniform(1)[0] * sum(self.weights)
        for number, weight in enumerate(self.weights):
            mark -= weight
            if mark < 0:
                return number

        return len(self.weights) - 1

    def stopped_at(self, step: int) -> frozenset[str]:
        """Return the tasks that have stopped when a step begins."""
        known = [names for start, names in self.changes if start <= step]
        return known[-1] if known else frozenset()

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        """Note the main figure of each task in the evaluation after a step; evaluations are noted
        in their order.
        """
        if not self.stop_and_go:
            return

        for name, value in figures.items():
            self.paces[name].note(value)

        stopped = frozenset(name for name, pace in self.paces.items() if pace.stopped)
        self.changes.append((step + LAG, stopped))


def sampling_weights(sizes: Sequence[int], schedule: str, temperature: float) -> list[float] | None:
    """Return the weights by which tasks are drawn; None for round robin."""
    if schedule == "round-robin":
        return None
    power = 1.0 / temperature if schedule == "temperature" else 1.0

    return [size**power for size in sizes]
