"""Build the batches of pretraining (captions or negatives, masks, labels, questions), each
step for a whole batch at once.
"""

from collections.abc import Sequence

import numpy as np

from megatron_interbert.config.objectives import OF_CLASSES, OF_REGIONS, WITHOUT_LABELS
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.masking import (
    BLOCK_DRAWS,
    mask_blocks,
    mask_regions,
    mask_tokens,
    within,
    word_draws,
)
from megatron_interbert.data.order import SampleOrder, SteppedOrder, epochs_from_weights
from megatron_interbert.data.packing import PackedBatch, image_locations, lay_out, to_batch
from megatron_interbert.data.questions import Questions
from megatron_interbert.data.randomness import CounterRandom, uniforms
from megatron_interbert.data.region_batch import (
    Allocate,
    RegionBatch,
    plain_memory,
    read_regions,
)
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.data.training_set import Fields
from megatron_interbert.errors import UsageError

# purpose tags of `uniforms`
NEGATIVE = 2
WORDS = 3
REGIONS = 4
OBJECTIVE = 10
ANSWER = 12


def refuse_unlabelled(corpus: Corpus, config: RunConfig) -> None:
    """Raise UsageError if a corpus lacks captions, or classes or attributes to train on."""
    if not corpus.num_captions:
        raise UsageError(
            f"{corpus.path}: holds no captions to train on; build the store with --captions"
        )

    names = config.objective_names()
    unlabelled = [name for name in names if name in OF_CLASSES]
    if unlabelled and not corpus.has_labels:
        raise UsageError(
            f"--data-path {corpus.path}: its regions have no class labels, so"
            f" {' and '.join(unlabelled)} cannot be trained; train with --objectives"
            f" {','.join(WITHOUT_LABELS)}, or build the store from features with labels"
        )

    if "attributes" in names and not corpus.num_attributes:
        raise UsageError(
            f"--data-path {corpus.path}: not all of its regions have attributes; leave attributes"
            " out of --objectives, or build the store from features with some (attrs_id,"
            " attrs_conf)"
        )


class PretrainingSet:
    """Represent the training samples of a corpus; indexed by a list of positions of the stream, it
    returns one PackedBatch.

    A sample and epoch give the same example on every rank, worker and restart, because all draws
    are keyed by (seed, epoch, sample), and by the step where it has one objective.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: CaptionTokenizer,
        config: RunConfig,
        questions: Questions | None = None,
    ) -> None:
        """Take the captions of a corpus and, as further texts, questions about its images."""
        refuse_unlabelled(corpus, config)
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.config = config
        self.samples = trainable_captions(corpus, config.language)
        self.questions = questions
        self.first_question = corpus.num_captions

        if questions is not None:
            corpus.add_texts(tokenizer.encode_batch(questions.texts), questions.images)
            asked = np.arange(self.first_question, corpus.num_captions)
            self.samples = np.concatenate([self.samples, asked])

        images = corpus.caption_image[self.samples]
        if (images == images[0]).all():
            raise UsageError(
                f"{corpus.path}: all captions to train on belong to one image, so no mismatched"
                " pair can be drawn; train on captions of two or more images"
            )

        self.mix = config.mix()
        self.order = self._make_order()
        self.needs_attributes = "attributes" in config.objective_names()
        self.has_hard_negatives = corpus.has_hard_negatives()
        corpus.label_width()  # raises if the stores differ
        self.feature_dim = corpus.feature_dim

    def _make_order(self) -> SampleOrder:
        """Return the order of samples: each store's by itself, questions after them."""
        bounds = np.lib.stride_tricks.sliding_window_view(self.corpus.first_caption, 2)
        parts = [self.samples[(self.samples >= a) & (self.samples < b)] for a, b in bounds]
        stores = len(self.corpus.stores)
        passes = passes_over_stores(self.config, [len(part) for part in parts[:stores]])
        order = SteppedOrder if self.mix else SampleOrder

        return order(
            parts,
            self.config.fit_partitions(min(len(part) for part in parts)),
            self.config.seed,
            passes + [1.0] * (self.questions is not None),
            self._lengths() if self.config.balance_tokens else None,
        )

    @property
    def most_rows(self) -> int:
        """Return the most regions that a micro-batch can have."""
        return self.config.micro_batch_size * min(
            self.config.max_regions, int(self.corpus.region_counts.max())
        )

    def _lengths(self) -> np.ndarray:
        """Estimate the tokens of each sample, int32 [captions]: its regions, plus a fifth of the
        bytes of its caption.
        """
        regions = np.minimum(self.corpus.region_counts, self.config.max_regions)[
            self.corpus.caption_image
        ]
        return regions + np.minimum(self.corpus.caption_bytes() // 5, self.config.max_tokens)

    def __getitem__(self, positions: Sequence[int]) -> PackedBatch:
        return to_batch(self.fields(self.order.pairs(positions, positions[0])))

    def fields(self, pairs: Sequence[tuple[int, ...]], allocate: Allocate = plain_memory) -> Fields:
        """Build the fields of a PackedBatch for (epoch, sample) pairs [B], with a mix of objectives
        for (epoch, sample, step); the features are in the memory that `allocate` returns.
        """
        epochs, samples, *steps = np.array(pairs, dtype=np.int64).T
        only = self._objective_of(int(steps[0][0])) if steps else ""
        words = word_draws(self.config.max_tokens - 2)
        places = max(self.config.max_regions, BLOCK_DRAWS)
        wanted = [(NEGATIVE, 0, 8), (WORDS, 0, words), (REGIONS, 0, places), (ANSWER, 0, 1)]
        for_captions, for_words, for_regions, for_answers = uniforms(
            self.config.seed, epochs, samples, wanted
        )
        captions = samples
        if only in ("", "itm"):
            captions = self._draw_captions(epochs, samples, for_captions)

        text = self._text(samples, captions, for_words, only in ("", "msm"))
        regions = read_regions(
            self.corpus,
            self.corpus.caption_image[samples],
            self.config.max_regions,
            allocate,
            self.needs_attributes,
        )
        layout = lay_out(text.pop("lengths"), regions.counts)
        hidden = np.zeros(len(regions.features), bool)
        if not only or only in OF_REGIONS:
            hidden = self._hidden(regions, for_regions)

        owner, _ = within(regions.offsets)
        is_target = hidden & (captions == samples)[owner]

        return {
            **layout,
            **text,
            "features": regions.features,
            "locations": image_locations(layout, regions.locations()),
            "hidden_regions": np.flatnonzero(hidden),
            "mrm_positions": layout["region_rows"][is_target],
            "mrm_regions": np.flatnonzero(is_target),
            "mrm_class_ids": regions.class_ids[is_target].astype(np.int64),
            "mrm_class_probs": regions.class_probs[is_target],
            **self._attributes(regions, is_target),
            **self._answers(samples, captions, for_answers[:, 0], only in ("", "itm")),
            "mismatched": (captions != samples).astype(np.int64),
            "sample_ids": samples,
            "head": only,
        }

    def _attributes(self, regions: RegionBatch, is_target: np.ndarray) -> Fields:
        """Build the fields of attributes, if they are trained on."""
        if not self.needs_attributes:
            return {}

        probs = regions.attribute_probs[is_target, 0]
        known = np.flatnonzero(probs > 0)

        return {
            "mrm_attribute_rows": known,
            "mrm_attribute_ids": regions.attribute_ids[is_target, 0][known].astype(np.int64),
            "mrm_attribute_probs": probs[known],
        }

    def _answers(
        self, samples: np.ndarray, captions: np.ndarray, draws: np.ndarray, wanted: bool
    ) -> Fields:
        """Build the fields of answers, if there are questions and they are `wanted`: those of
        questions that are shown with their own images.
        """
        if self.questions is None:
            return {}

        asked = np.flatnonzero((samples >= self.first_question) & (captions == samples) & wanted)
        answers = self.questions.draw(samples[asked] - self.first_question, draws[asked])

        return {"labels": answers[answers >= 0], "label_owner": asked[answers >= 0]}

    def _hidden(self, regions: RegionBatch, draws: np.ndarray) -> np.ndarray:
        """Choose the regions to hide, bool [R]."""
        if self.config.region_masking == "blocks":
            return mask_blocks(regions.boxes, regions.sizes, regions.offsets, draws)
        return mask_regions(regions.boxes, regions.offsets, self.config.masking, draws)

    def _objective_of(self, step: int) -> str:
        """Draw the only objective of a step, which begins at a position of the stream."""
        weights = np.cumsum(list(self.mix.values()))
        draw = CounterRandom(self.config.seed, OBJECTIVE, 0, step).uniform(1)[0]
        return list(self.mix)[int(np.searchsorted(weights, draw * weights[-1], side="right"))]

    def draw_captions(self, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Draw the caption shown with each sample's image, int64 [B]: its own half the time, else
        a random or mined one of another image.
        """
        return self._draw_captions(
            epochs, samples, uniforms(self.config.seed, epochs, samples, [(NEGATIVE, 0, 8)])[0]
        )

    def _draw_captions(
        self, epochs: np.ndarray, samples: np.ndarray, draws: np.ndarray
    ) -> np.ndarray:
        config = self.config
        corpus = self.corpus
        chosen = samples.copy()
        images = corpus.caption_image[samples]
        open_rows = draws[:, 0] >= 0.5

        if self.has_hard_negatives:
            for row in np.flatnonzero(open_rows & (draws[:, 1] < config.hard_negatives)):
                candidates = self._hard_candidates(int(samples[row]))
                if len(candidates):
                    chosen[row] = candidates[int(draws[row, 2] * len(candidates))]
                    open_rows[row] = False

        rows = np.flatnonzero(open_rows)
        draw = draws[open_rows, 4]
        place = 8

        while len(rows):
            chosen[rows] = self.samples[(draw * len(self.samples)).astype(np.int64)]
            # captions of the same image are drawn again
            rows = rows[corpus.caption_image[chosen[rows]] == images[rows]]
            draw = uniforms(config.seed, epochs[rows], samples[rows], [(NEGATIVE, place, 1)])[0][
                :, 0
            ]
            place += 4

        return chosen

    def _hard_candidates(self, sample: int) -> np.ndarray:
        candidates = self.corpus.hard_negatives(sample)
        candidates = candidates[
            self.corpus.caption_image[candidates] != self.corpus.caption_image[sample]
        ]
        if not self.config.language:
            return candidates

        place = np.searchsorted(self.samples, candidates).clip(max=len(self.samples) - 1)

        return candidates[self.samples[place] == candidates]

    def _text(
        self, samples: np.ndarray, captions: np.ndarray, draws: np.ndarray, masked: bool
    ) -> Fields:
        """Build the token fields, and the lengths [B] of the texts with [CLS] and [SEP]; words are
        hidden if `masked`.
        """
        config = self.config
        tokenizer = self.tokenizer
        longest = config.max_tokens - 2
        tokens = self.corpus.tokens(captions, tokenizer, longest)
        shown, targets = tokens.ids, np.zeros(len(tokens.ids), bool)
        if masked:
            shown, targets = mask_tokens(tokens, tokenizer, config.masking, draws)

        owner, _ = within(tokens.offsets)
        if not config.msm_on_mismatched:
            targets &= (captions == samples)[owner]

        # after one [CLS] for each caption so far and one [SEP] for each caption before
        place = np.arange(len(shown)) + 2 * owner + 1
        lengths = np.diff(tokens.offsets) + 2
        ends = np.cumsum(lengths)
        ids = np.empty(int(ends[-1]), np.int64)
        ids[ends - lengths] = tokenizer.cls
        ids[ends - 1] = tokenizer.sep
        ids[place] = shown

        return {
            "token_ids": ids,
            "token_types": np.zeros(len(ids), np.int64),
            "msm_positions": place[targets],
            "msm_labels": tokens.ids[targets].astype(np.int64),
            "lengths": lengths,
        }


def trainable_captions(corpus: Corpus, language: str) -> np.ndarray:
    """Return the captions with a language tag, int64 [n]; all captions for an empty tag."""
    if not language:
        return np.arange(corpus.num_captions)

    tags = corpus.languages()
    chosen = np.flatnonzero(tags == language)
    if not len(chosen):
        raise UsageError(
            f"--language {language}: no such captions in {corpus.path}, which has"
            f" {sorted(set(tags))}"
        )

    return chosen


def passes_over_stores(config: RunConfig, sizes: Sequence[int]) -> list[float]:
    """Return the passes over each store in one epoch, from --data-epochs or --data-weights."""
    for name, text in (
        ("--data-epochs", config.data_epochs),
        ("--data-weights", config.data_weights),
    ):
        if not text:
            continue
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            raise UsageError(
                f"{name} is '{text}', expected numbers separated by commas, one for each store"
            ) from None

        if len(values) != len(sizes) or not all(0 < value < float("inf") for value in values):
            raise UsageError(
                f"{name} is '{text}', expected {len(sizes)} positive numbers, one for each store of"
                " --data-path"
            )

        return values if name == "--data-epochs" else epochs_from_weights(values, sizes)

    return [1.0] * len(sizes)
