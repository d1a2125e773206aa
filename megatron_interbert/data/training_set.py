"""What the loader asks of a set of samples; pretraining and the downstream tasks each have one."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_interbert.config.training import TrainConfig
from megatron_interbert.data.order import SampleOrder
from megatron_interbert.data.region_batch import Allocate

Fields = dict[str, np.ndarray | int]  # of a PackedBatch


class TrainingSet(Protocol):
    """Samples in an endless order. Must be cheap to pickle: loader processes get a copy."""

    config: TrainConfig
    order: SampleOrder
    feature_dim: int
    most_rows: int  # regions that a micro-batch can have; 0 for text alone

    def fields(self, pairs: Sequence[tuple[int, int]], allocate: Allocate) -> Fields:
        """Give the fields of a PackedBatch for (epoch, sample) pairs [B]; the features lie in the
        memory that `allocate` gives.
        """
