"""Draw the samples of each step from the task that the schedule names."""

from collections.abc import Mapping, Sequence

from megatron_interbert.config.training import TrainConfig
from megatron_interbert.data.order import SampleOrder
from megatron_interbert.data.region_batch import Allocate, plain_memory
from megatron_interbert.data.training_set import Fields, TrainingSet
from megatron_interbert.tasks.multitask.schedule import Schedule


class MultitaskOrder:
    """Represent the stream of (task, ..) of a run in which each step has samples of one task; a
    task's own stream continues from one of its steps to the next.
    """

    def __init__(
        self, orders: Sequence[SampleOrder], schedule: Schedule, config: TrainConfig
    ) -> None:
        self.orders = list(orders)
        self.schedule = schedule
        self.config = config

    @property
    def epoch_length(self) -> int:
        """Return the samples of an epoch: of as many rounds as the longest task needs for all of
        its samples, or, if tasks are drawn, of all samples once.
        """
        lengths = [order.epoch_length for order in self.orders]
        return max(lengths) * len(lengths) if self.schedule.weights is None else sum(lengths)

    def pairs(self, positions: Sequence[int], step_start: int) -> list[tuple[int, ...]]:
        """Return (number of the task, what its own order says of the sample) at positions of one
        optimizer step, which begins at position `step_start`.
        """
        batch = self.config.global_batch_size
        number, earlier = self.schedule.at(step_start // batch)
        start = earlier * batch
        own = [start + position - step_start for position in positions]

        return [(number, *pair) for pair in self.orders[number].pairs(own, start)]


class MultitaskSet:
    """Hold the training samples of several tasks."""

    def __init__(
        self, sets: Mapping[str, TrainingSet], schedule: Schedule, config: TrainConfig
    ) -> None:
        self.config = config
        self.names = list(sets)
        self.sets = list(sets.values())
        self.order = MultitaskOrder([some.order for some in self.sets], schedule, config)
        self.feature_dim = max(some.feature_dim for some in self.sets)

    @property
    def most_rows(self) -> int:
        """Return the most regions that a micro-batch can have."""
        each = [-(-some.most_rows // some.config.micro_batch_size) for some in self.sets]
        return max(each) * self.config.micro_batch_size

    def fields(self, pairs: Sequence[tuple[int, ...]], allocate: Allocate = plain_memory) -> Fields:
        """Return the fields of a PackedBatch for (task, ..) pairs [B], all of one task."""
        number = pairs[0][0]
        fields = self.sets[number].fields([pair[1:] for pair in pairs], allocate)

        return {**fields, "head": self.names[number]}
