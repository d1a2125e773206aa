"""Lay out batches of texts with the regions that they may mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_interbert.config.training import TrainConfig
from megatron_interbert.data.order import SampleOrder
from megatron_interbert.data.region_batch import Allocate, RegionBatch, plain_memory
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.data.training_set import Fields
from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.pairs import pair_fields
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.texts import FramedTexts
from megatron_interbert.tasks.two_stores import TwoStores

RIGHT = 0.5  # IoU from which a region is trained to be right


@dataclass(frozen=True)
class Shown:
    """Hold the regions of B samples that may be chosen: which of the batch's regions they are,
    int64 [C], the sample of each [C], and their boxes in pixels of the annotations, float64 [C, 4].
    """

    regions: np.ndarray
    owner: np.ndarray
    boxes: np.ndarray


class RegionSamples:
    """Hold n samples of one task, tokenised, whose batches are for the head `head`.

    A sample with `choices` may choose only the regions that are nearest to these; all regions if
    none overlaps a choice, and then no choice is right.
    """

    def __init__(
        self,
        head: str,
        records: Records,
        stores: TwoStores,
        tokenizer: CaptionTokenizer,
        max_tokens: int,
    ) -> None:
        self.head = head
        self.stores = stores
        self.images = records.images
        self.sizes = np.array([record.size for record in records.items], np.float64)
        self.choices = [record.choices for record in records.items]
        self.texts = FramedTexts([r.texts for r in records.items], tokenizer, max_tokens)

    def __len__(self) -> int:
        return len(self.images)

    def lengths(self) -> np.ndarray:
        """Return the tokens and regions of each sample, int64 [n]."""
        return self.texts.lengths() + self.stores.region_counts(self.images)

    def fields(
        self, rows: Sequence[int], allocate: Allocate = plain_memory
    ) -> tuple[Fields, Shown]:
        """Return the fields of a PackedBatch for some samples [B], without scores, and the regions
        to choose among.
        """
        regions = self.stores.read(self.images[rows])
        dim = self.stores.feature_dim
        fields = pair_fields(self.texts.inputs(rows), regions, np.arange(len(rows)), dim, allocate)
        shown = self.choosable(rows, regions)
        counts = np.bincount(shown.owner, minlength=len(rows))
        first = (np.cumsum(counts) - counts)[shown.owner]

        return {
            **fields,
            "head": self.head,
            "candidates": fields["region_rows"][shown.regions],
            "candidate_owner": shown.owner,
            "candidate_place": np.arange(len(shown.owner)) - first,
            "max_candidates": int(counts.max()),
        }, shown

    def choosable(self, rows: Sequence[int], regions: RegionBatch) -> Shown:
        """Return the regions that samples [B] may choose."""
        owner = np.repeat(np.arange(len(rows)), regions.counts)
        boxes = regions.boxes * np.tile(self.sizes[rows], 2)[owner]
        allowed = np.ones(len(owner), bool)

        for place, row in enumerate(rows):
            if self.choices[row] is not None:
                own = owner == place
                allowed[own] = nearest_to(self.choices[row], boxes[own])

        chosen = np.flatnonzero(allowed)

        return Shown(chosen, owner[chosen], boxes[chosen])


def nearest_to(choices: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return which boxes [n, 4] are the nearest to one of the choices [c, 4], bool [n]; all if none
    overlaps a choice.
    """
    shared = overlaps(boxes, choices)
    met = shared.max(axis=0) > 0
    if not met.any():
        return np.ones(len(boxes), bool)

    found = np.zeros(len(boxes), bool)
    found[shared.argmax(axis=0)[met]] = True

    return found


class RegionSet:
    """Hold the training samples of a task and their order."""

    def __init__(
        self, samples: RegionSamples, records: Records, config: TrainConfig, convention: str
    ) -> None:
        self.config = config
        self.samples = samples
        self.targets = [record.targets for record in records.items]
        self.convention = convention
        self.feature_dim = samples.stores.feature_dim
        rows = np.arange(len(samples))
        self.order = SampleOrder(
            [rows], config.fit_partitions(len(rows)), config.seed, lengths=samples.lengths()
        )

    @property
    def most_rows(self) -> int:
        """Return the most regions that a micro-batch can have."""
        return self.config.micro_batch_size * self.samples.stores.most_regions()

    def fields(self, pairs: Sequence[tuple[int, int]], allocate: Allocate = plain_memory) -> Fields:
        """Return the fields of a PackedBatch for (epoch, sample) pairs [B]; the score of each
        region to choose is its IoU with a right box, 0 below RIGHT.
        """
        rows = [sample for _, sample in pairs]
        fields, shown = self.samples.fields(rows, allocate)
        scores = np.zeros(len(shown.owner), np.float32)

        for place, row in enumerate(rows):
            own = shown.owner == place
            scores[own] = overlaps(shown.boxes[own], self.targets[row], self.convention).max(axis=1)

        scores[scores < RIGHT] = 0.0

        return {**fields, "candidate_scores": scores, "sample_ids": np.array(rows)}
