"""Make random samples of realistic sizes, and pad them as other implementations do."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.packing import Example
from megatron_interbert.model.presets import load_model_config

MASKED = 0.15  # share of words and of regions that are targets; at least one of each
IGNORED = -100  # label of positions that are not targets


def sizes_of(model: str) -> ModelConfig:
    """Return the sizes of a preset or JSON file, with small ones for those taken from the data."""
    sizes = load_model_config(model)
    if sizes.vocab_size and sizes.feature_dim and sizes.num_classes:
        return sizes
    return dataclasses.replace(sizes, vocab_size=1000, feature_dim=64, num_classes=100)


def random_examples(
    sizes: ModelConfig,
    samples: int,
    words: tuple[int, int] = (12, 16),
    regions: tuple[int, int] = (36, 36),
    seed: int = 0,
) -> list[Example]:
    """Return samples of `words` (from, to) tokens and `regions` (from, to) boxes, every second one
    mismatched.
    """
    random = np.random.default_rng(seed)
    examples = []

    for number in range(samples):
        count, boxes = (int(random.integers(low, high + 1)) for low, high in (words, regions))
        ids = random.integers(0, sizes.vocab_size, count)
        positions = np.sort(
            random.choice(np.arange(1, count - 1), max(1, round(MASKED * count)), replace=False)
        )
        hidden = np.zeros(boxes, bool)
        hidden[random.choice(boxes, max(1, round(MASKED * boxes)), replace=False)] = True
        examples.append(
            Example(
                token_ids=ids,
                token_types=np.zeros(count, np.int64),
                features=random.normal(size=(boxes, sizes.feature_dim)).astype(np.float16),
                locations=random.uniform(size=(boxes, 5)).astype(np.float32),
                class_ids=random.integers(0, sizes.num_classes, (boxes, 1)),
                class_probs=np.ones((boxes, 1), np.float32),
                hidden_regions=hidden,
                msm_positions=positions,
                msm_labels=ids[positions],
                mismatched=number % 2,
            )
        )

    return examples


@dataclass
class PaddedBatch:
    """Hold B samples padded to T tokens and R regions.

    Masks are 1 at real positions; labels are IGNORED except at targets.
    """

    token_ids: torch.Tensor  # int64 [B, T]
    token_mask: torch.Tensor  # float32 [B, T]
    word_labels: torch.Tensor  # int64 [B, T]
    features: torch.Tensor  # float32 [B, R, F], hidden regions zeroed
    locations: torch.Tensor  # float32 [B, R, 5]
    region_mask: torch.Tensor  # float32 [B, R]
    region_labels: torch.Tensor  # int64 [B, R]
    mismatched: torch.Tensor  # int64 [B]


def pad(examples: Sequence[Example], tokens: int, regions: int) -> PaddedBatch:
    """Pad all samples to the same lengths, as scripts with fixed shapes do."""
    count = len(examples)
    features = examples[0].features.shape[1]
    batch = PaddedBatch(
        torch.zeros(count, tokens, dtype=torch.int64),
        torch.zeros(count, tokens),
        torch.full((count, tokens), IGNORED),
        torch.zeros(count, regions, features),
        torch.zeros(count, regions, 5),
        torch.zeros(count, regions),
        torch.full((count, regions), IGNORED),
        torch.tensor([int(example.mismatched) for example in examples]),
    )

    for row, example in enumerate(examples):
        words = len(example.token_ids)
        boxes = len(example.features)
        batch.token_ids[row, :words] = torch.from_numpy(example.token_ids)
        batch.token_mask[row, :words] = 1
        batch.word_labels[row, example.msm_positions] = torch.from_numpy(example.msm_labels)
        shown = np.where(example.hidden_regions[:, None], 0, example.features).astype(np.float32)
        batch.features[row, :boxes] = torch.from_numpy(shown)
        batch.locations[row, :boxes] = torch.from_numpy(example.locations)
        batch.region_mask[row, :boxes] = 1
        hidden = np.flatnonzero(example.hidden_regions)
        batch.region_labels[row, hidden] = torch.from_numpy(example.class_ids[hidden, 0])

    return batch
