"""Define what the loader needs of a set of samples, for pretraining and each downstream task."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_interbert.config.training import TrainConfig
from megatron_interbert.data.order import SampleOrder
from megatron_interbert.data.region_batch import Allocate

Fields = dict[str, np.ndarray | int | str]  # of a PackedBatch


class TrainingSet(Protocol):
    """Provide samples in an endless order; must be cheap to pickle, as loader processes get a
    copy.
    """

    config: TrainConfig
    order: SampleOrder
    feature_dim: int
    most_rows: int  # the most regions that a micro-batch can have; 0 for text alone

    def fields(self, pairs: Sequence[tuple[int, ...]], allocate: Allocate) -> Fields:
        """Build the fields of a PackedBatch for what the order's `pairs` returns [B]; the features
        are in the memory that `allocate` returns.
        """
