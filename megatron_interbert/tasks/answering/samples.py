"""Lay out batches of texts about one or more images, with their right answers."""

from collections.abc import Sequence

import numpy as np

from megatron_interbert.config.training import TrainConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.order import SampleOrder
from megatron_interbert.data.region_batch import Allocate, RegionBatch, plain_memory, read_regions
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.data.training_set import Fields
from megatron_interbert.tasks.answering.vocabulary import AnswerList
from megatron_interbert.tasks.pairs import pair_fields
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.texts import FramedTexts


class AnswerSamples:
    """Hold n samples of one task, tokenised, whose batches are for the head `head`.

    A sample of several images is a row of the batch for each of them, with the same text; or, with
    `side_by_side`, one row with the regions of all.
    """

    def __init__(
        self,
        head: str,
        records: Records,
        corpus: Corpus,
        tokenizer: CaptionTokenizer,
        max_tokens: int,
        max_regions: int,
        side_by_side: bool = False,
    ) -> None:
        self.head = head
        self.corpus = corpus
        self.records = records
        self.images = records.images
        self.texts = FramedTexts([r.texts for r in records.items], tokenizer, max_tokens)
        self.max_regions = max_regions
        self.side_by_side = side_by_side
        self.prepare()

    def prepare(self) -> None:
        """Take from the records what batches need beside texts and images; here nothing."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def most_regions(self) -> int:
        """Return the most regions that the batch rows of one sample can have."""
        most = min(self.max_regions, int(self.corpus.region_counts.max()))
        return self.images.shape[1] * most

    def lengths(self) -> np.ndarray:
        """Return the tokens and regions of each sample, int64 [n]."""
        regions = np.minimum(self.corpus.region_counts[self.images], self.max_regions)
        return self.texts.lengths() + regions.sum(axis=1)

    def fields(self, rows: Sequence[int], allocate: Allocate = plain_memory) -> Fields:
        """Return the fields of a PackedBatch for some samples [B], without labels."""
        texts = self.texts.inputs(rows)
        images = self.images[rows]
        dim = self.corpus.feature_dim

        if self.side_by_side:
            regions = read_regions(self.corpus, images.ravel(), self.max_regions)
            joined = beside_each_other(regions, images.shape[1])
            fields = pair_fields(texts, joined, np.arange(len(texts)), dim, allocate)
        else:
            shown, image_of = np.unique(images, return_inverse=True)
            regions = read_regions(self.corpus, shown, self.max_regions)
            repeated = [text for text in texts for _ in range(images.shape[1])]
            fields = pair_fields(repeated, regions, image_of.reshape(-1), dim, allocate)

        return {**fields, "head": self.head}


def beside_each_other(regions: RegionBatch, images: int) -> RegionBatch:
    """Return regions of B * images images as those of B wide ones, in which `images` images stand
    side by side with equal widths: the place of a region tells which image it is of.
    """
    owner = np.repeat(np.arange(len(regions.sizes)), regions.counts)
    boxes = regions.locations()[:, :4]
    boxes[:, 0::2] = (boxes[:, 0::2] + (owner % images)[:, None]) / images
    sizes = np.ones((len(regions.sizes) // images, 2), np.float32)

    return RegionBatch(
        regions.features,
        boxes.astype(np.float32),
        regions.class_ids,
        regions.class_probs,
        sizes,
        regions.offsets[::images],
    )


class Targets:
    """Hold the right answers of n samples: number and score of each, one after another, and the
    offsets [n + 1] of each sample's own.
    """

    def __init__(self, records: Records, answers: AnswerList) -> None:
        known = [answers.known(record.answers) for record in records.items]
        self.offsets = np.cumsum([0, *map(len, known)])
        flat = [pair for some in known for pair in some]
        self.numbers = np.array([number for number, _ in flat], np.int64)
        self.scores = np.array([score for _, score in flat], np.float32)

    @property
    def without(self) -> int:
        """Return the number of samples none of whose answers the head can give."""
        return int((np.diff(self.offsets) == 0).sum())

    def fields(self, rows: Sequence[int]) -> Fields:
        """Return the label fields of a PackedBatch for some samples [B]."""
        runs = [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows]
        chosen = np.concatenate(runs)

        return {
            "labels": self.numbers[chosen],
            "label_owner": np.repeat(np.arange(len(rows)), [len(run) for run in runs]),
            "label_scores": self.scores[chosen],
        }


class AnswerSet:
    """Hold the training samples of a task and their order."""

    def __init__(self, samples: AnswerSamples, targets: Targets, config: TrainConfig) -> None:
        self.config = config
        self.samples = samples
        self.targets = targets
        self.feature_dim = samples.corpus.feature_dim
        rows = np.arange(len(samples))
        self.order = SampleOrder(
            [rows], config.fit_partitions(len(rows)), config.seed, lengths=samples.lengths()
        )

    @property
    def most_rows(self) -> int:
        """Return the most regions that a micro-batch can have."""
        return self.config.micro_batch_size * self.samples.most_regions

    def fields(self, pairs: Sequence[tuple[int, int]], allocate: Allocate = plain_memory) -> Fields:
        """Return the fields of a PackedBatch for (epoch, sample) pairs [B]; `labels`, their scores
        and owners list the right answers.
        """
        rows = [sample for _, sample in pairs]
        fields = self.samples.fields(rows, allocate)
        ids = np.repeat(rows, len(fields["sample_ids"]) // len(rows))

        return {**fields, **self.targets.fields(rows), "sample_ids": ids}
