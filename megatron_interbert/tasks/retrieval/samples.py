"""Make the training samples of caption-based image retrieval: four pairs for each caption.

    right            the caption and its image                  class 0
    random caption   a caption of another image, and the image  class 1
    random image     the caption, and another image             class 1
    hard caption     a caption of a near image, and the image   class 1

Near images are the 100 whose mean features are nearest to the image's (hard_images.npy).

All draws are keyed by (seed, epoch, caption), so every rank, worker and restart makes the same
pairs.
"""

from collections.abc import Sequence

import numpy as np

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.order import SampleOrder
from megatron_interbert.data.pretraining import trainable_captions
from megatron_interbert.data.randomness import uniforms
from megatron_interbert.data.region_batch import Allocate, plain_memory, read_regions
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.data.training_set import Fields
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.pairs import caption_texts, pair_fields
from megatron_interbert.tasks.retrieval.config import RetrievalConfig

CANDIDATES = 7  # purpose tag of `uniforms`
PAIRS = 4


class RetrievalSet:
    """Hold the training samples: a sample is a caption, and its four pairs are consecutive rows of
    the batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: CaptionTokenizer,
        config: RetrievalConfig,
        captions: np.ndarray | None = None,
    ) -> None:
        """Take all trainable captions of a corpus, or `captions`, of these numbers."""
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.config = config
        every = captions is None
        self.samples = trainable_captions(corpus, config.language) if every else captions
        images = corpus.caption_image[self.samples]

        if not len(images) or (images == images[0]).all():
            raise UsageError(
                f"--data-path {corpus.path}: retrieval needs captions of two images or more"
            )

        self.order = SampleOrder(
            [self.samples], config.fit_partitions(len(self.samples)), config.seed
        )
        # captions, grouped by image
        self.by_image = self.samples[np.argsort(images, kind="stable")]
        self.first_of = np.searchsorted(np.sort(images), np.arange(corpus.num_images + 1))
        self.has_hard_images = corpus.has_hard_images()
        self.feature_dim = corpus.feature_dim

    @property
    def most_rows(self) -> int:
        """Return the largest number of regions that a micro-batch can have."""
        return (
            PAIRS
            * self.config.micro_batch_size
            * min(self.config.max_regions, int(self.corpus.region_counts.max()))
        )

    def fields(self, pairs: Sequence[tuple[int, int]], allocate: Allocate = plain_memory) -> Fields:
        """Return the fields of a PackedBatch of 4 B text-image pairs, for (epoch, caption) pairs
        [B]; `mismatched` [4 B] holds the classes.
        """
        epochs, captions = np.array(pairs, dtype=np.int64).T
        images = self.corpus.caption_image[captions]
        other = self._of_another_image(epochs, captions, images, place=0)
        other_image = self.corpus.caption_image[
            self._of_another_image(epochs, captions, images, place=64)
        ]
        hard = self._hard_captions(epochs, captions, images)
        texts = np.stack([captions, other, captions, hard], axis=1).ravel()
        shown = np.stack([images, images, other_image, images], axis=1).ravel()
        unique, image_of = np.unique(shown, return_inverse=True)
        regions = read_regions(self.corpus, unique, self.config.max_regions)
        framed = caption_texts(self.corpus, self.tokenizer, texts, self.config.max_tokens)
        fields = pair_fields(framed, regions, image_of, self.feature_dim, allocate)
        wrong = np.tile(np.array([0, 1, 1, 1]), len(captions))

        return {**fields, "mismatched": wrong, "sample_ids": np.repeat(captions, PAIRS)}

    def _of_another_image(
        self, epochs: np.ndarray, captions: np.ndarray, images: np.ndarray, place: int
    ) -> np.ndarray:
        """Return, for each sample, a random caption of another image [B].

        `place` is where the draws begin in each sample's stream of random numbers.
        """
        chosen = captions.copy()
        rows = np.arange(len(captions))
        while len(rows):
            draw = uniforms(
                self.config.seed, epochs[rows], captions[rows], [(CANDIDATES, place, 1)]
            )[0][:, 0]
            chosen[rows] = self.samples[(draw * len(self.samples)).astype(np.int64)]
            rows = rows[self.corpus.caption_image[chosen[rows]] == images[rows]]
            place += 4

        return chosen

    def _hard_captions(
        self, epochs: np.ndarray, captions: np.ndarray, images: np.ndarray
    ) -> np.ndarray:
        """Return, for each sample, a caption of an image near its own [B]; a random one if no near
        image has a caption.
        """
        chosen = self._of_another_image(epochs, captions, images, place=128)
        if not self.has_hard_images:
            return chosen

        draws = uniforms(self.config.seed, epochs, captions, [(CANDIDATES, 192, 2)])[0]
        for row, (image, (which, text)) in enumerate(
            zip(images.tolist(), draws.tolist(), strict=True)
        ):
            near = self.corpus.hard_images(image)
            near = near[self.first_of[near + 1] > self.first_of[near]]
            if len(near):
                start = self.first_of[(candidate := near[int(which * len(near))])]
                stop = self.first_of[candidate + 1]
                chosen[row] = self.by_image[start + int(text * (stop - start))]

        return chosen
