"""Lay out batches of the oracle's questions.

A sample shows the scene and, beside it, the object alone, in the place that it has in the scene: so
the model knows which object is meant. Of the regions that a store has for the picture the object is
the one with the best IoU or, where none overlaps it, with the nearest centre; give the store of the
annotated boxes. The text is the question and the object's kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_interbert.data.region_batch import Allocate, RegionBatch, plain_memory, read_regions
from megatron_interbert.data.training_set import Fields
from megatron_interbert.tasks.answering.samples import AnswerSamples
from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.pairs import pair_fields


@dataclass(frozen=True, slots=True)
class Asked:
    """Hold the ids of a question and its dialogue, and the box of its object, x1 y1 x2 y2 as shares
    of the picture.
    """

    dialogue: str
    question: str
    box: np.ndarray


class OracleSamples(AnswerSamples):
    """Hold questions about objects; see the module's text."""

    def prepare(self) -> None:
        """Take the box of each question's object from the records."""
        self.boxes = np.stack([record.facts.box for record in self.records.items])

    @property
    def most_regions(self) -> int:
        """Return the most regions that a sample can have."""
        return super().most_regions + 1

    def fields(self, rows: Sequence[int], allocate: Allocate = plain_memory) -> Fields:
        """Return the fields of a PackedBatch for some samples [B], without labels."""
        regions = read_regions(self.corpus, self.images[rows, 0], self.max_regions)
        shown = with_object_beside(regions, self.boxes[rows])
        texts = self.texts.inputs(rows)
        dim = self.corpus.feature_dim

        return {
            **pair_fields(texts, shown, np.arange(len(texts)), dim, allocate),
            "head": self.head,
        }


def with_object_beside(regions: RegionBatch, boxes: np.ndarray) -> RegionBatch:
    """Return the regions of B images in the left half of a wide one, and in its right half, as the
    last region, the one that is nearest to each image's box [B, 4].
    """
    shares = regions.locations()[:, :4]
    order: list[int] = []
    is_object: list[bool] = []

    for image, (start, stop) in enumerate(zip(regions.offsets, regions.offsets[1:], strict=False)):
        nearest = start + nearest_region(shares[start:stop], boxes[image])
        order += [*range(start, stop), nearest]
        is_object += [False] * (stop - start) + [True]

    places = shares[order]
    places[:, 0::2] = (places[:, 0::2] + np.array(is_object)[:, None]) / 2
    images = len(regions.sizes)

    return RegionBatch(
        regions.features[order],
        places.astype(np.float32),
        regions.class_ids[:0],
        regions.class_probs[:0],
        np.ones((images, 2), np.float32),
        regions.offsets + np.arange(images + 1),
    )


def nearest_region(regions: np.ndarray, box: np.ndarray) -> int:
    """Return which of regions [n, 4] has the best IoU with a box [4] or, if none overlaps it, the
    nearest centre.
    """
    shared = overlaps(regions, box[None])[:, 0]
    if shared.max() > 0:
        return int(shared.argmax())

    away = (regions[:, :2] + regions[:, 2:]) - (box[:2] + box[2:])

    return int((away**2).sum(axis=1).argmin())
