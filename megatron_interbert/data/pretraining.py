"""Samples of the three pretraining tasks: a caption or a negative one, masks, labels; and the loader around them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_interbert.config import RunConfig
from megatron_interbert.data.masking import mask_regions, mask_tokens
from megatron_interbert.data.order import MicroBatches, SampleOrder
from megatron_interbert.data.packing import Example, PackedBatch, normalised_locations, pack
from megatron_interbert.data.randomness import CounterRandom
from megatron_interbert.data.store import RegionStore
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError

NEGATIVE, WORDS, REGIONS = 2, 3, 4  # purpose tags of CounterRandom


@dataclass
class WorkerFailure:
    """A UsageError on its way from a loader process to the training process (DataLoader would bury it in a traceback)."""

    message: str


class PretrainingSet(Dataset):
    """Indexed by a list of positions of the stream; gives one PackedBatch. The same sample and epoch give the same
    example on every rank, worker and restart, because all draws are keyed by (seed, epoch, sample)."""

    def __init__(self, store: RegionStore, tokenizer: CaptionTokenizer, config: RunConfig) -> None:
        self.store, self.tokenizer, self.config = store, tokenizer, config
        self.order = SampleOrder(trainable_captions(store, config.language), config.data_partitions, config.seed)
        images = store.caption_image[self.order.samples]
        if (images == images[0]).all():
            raise UsageError(f"{store.path}: all captions to train on belong to one image, so no mismatched pair can be drawn")
        self.has_hard_negatives = store.hard_negatives() is not None
        self._hard_negatives: np.ndarray | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_hard_negatives": None}

    def __getitem__(self, positions: list[int]) -> PackedBatch | WorkerFailure:
        try:
            return pack([self.example(*self.order.at(position)) for position in positions], self.store.feature_dim)
        except UsageError as error:
            return WorkerFailure(str(error))

    def example(self, epoch: int, sample: int) -> Example:
        """The masked, possibly mismatched pair that belongs to (epoch, sample)."""
        config = self.config
        caption = self.draw_caption(epoch, sample)
        mismatched = int(caption != sample)
        tokens = self.tokenizer.encode(self.store.caption(caption), config.max_tokens)
        masked = mask_tokens(tokens, self.tokenizer, config.masking, CounterRandom(config.seed, WORDS, epoch, sample))
        targets = masked.targets if config.msm_on_mismatched or not mismatched else masked.targets[:0]
        regions = self.store.read(int(self.store.caption_image[sample]), config.max_regions)
        return Example(
            token_ids=np.concatenate([[self.tokenizer.cls], masked.ids, [self.tokenizer.sep]]),
            token_types=np.zeros(len(tokens.ids) + 2, dtype=np.int64),
            features=regions.features,
            locations=normalised_locations(regions.boxes, regions.size),
            class_ids=regions.class_ids,
            class_probs=regions.class_probs,
            hidden_regions=mask_regions(regions.boxes, config.masking, CounterRandom(config.seed, REGIONS, epoch, sample)),
            msm_positions=targets + 1,
            msm_labels=tokens.ids[targets],
            mismatched=mismatched,
            sample_id=sample,
        )

    def draw_caption(self, epoch: int, sample: int) -> int:
        """The caption shown with the sample's image: half the time its own, else a random or hard one of another image."""
        random = CounterRandom(self.config.seed, NEGATIVE, epoch, sample)
        mismatch, hard = random.uniform(2)
        if mismatch < 0.5:
            return sample
        image = self.store.caption_image[sample]
        if self.has_hard_negatives and hard < self.config.hard_negatives:
            if self._hard_negatives is None:
                self._hard_negatives = self.store.hard_negatives()
            candidates = self._hard_negatives[sample]
            candidates = candidates[candidates >= 0]
            candidates = candidates[self.store.caption_image[candidates] != image]
            if self.config.language:
                candidates = candidates[np.isin(candidates, self.order.samples)]
            if len(candidates):
                return int(candidates[random.integer(len(candidates))])
        while True:
            other = int(self.order.samples[random.integer(len(self.order.samples))])
            if self.store.caption_image[other] != image:
                return other


def trainable_captions(store: RegionStore, language: str) -> np.ndarray:
    """int64 [n]: captions of a language tag, or all for an empty one."""
    if not language:
        return np.arange(store.num_captions)
    tags = store.languages()
    chosen = np.flatnonzero(tags == language)
    if not len(chosen):
        raise UsageError(f"--language {language}: no such captions in {store.path}, which has {sorted(set(tags))}")
    return chosen


class BatchStream:
    """Endless micro-batches of one data-parallel rank. `wait` accumulates the seconds spent waiting for the loader."""

    def __init__(
        self,
        dataset: PretrainingSet,
        consumed: int,
        global_batch: int,
        rank: int,
        ranks: int,
        pin_memory: bool = False,
        workers: int | None = None,
    ) -> None:
        config = dataset.config
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it forks; parallelism is ours
        workers = config.num_workers if workers is None else workers
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=MicroBatches(consumed, global_batch, config.micro_batch_size, rank, ranks),
            num_workers=workers,
            multiprocessing_context=config.worker_start if workers else None,
            prefetch_factor=4 if workers else None,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_quiet_worker,
            in_order=True,
            timeout=300 if workers else 0,
        )

    def __iter__(self) -> Iterator[PackedBatch]:
        for batch in self.loader:
            if isinstance(batch, WorkerFailure):
                error = UsageError(batch.message)
                error.local = True  # the other ranks do not know of it: this one must speak
                raise error
            yield batch


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
