"""Make random samples of realistic sizes, and pad them as other implementations do."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.packing import Example
from megatron_interbert.model.presets import load_model_config

IGNORED = -100  # label of positions that are not targets


def sizes_of(model: str) -> ModelConfig:
    """Return the sizes of a preset or JSON file, with small ones for those taken from the data."""
    sizes = load_model_config(model)
    if sizes.vocab_size and sizes.feature_dim and sizes.num_classes:
        return sizes
    return dataclasses.replace(sizes, vocab_size=1000, feature_dim=64, num_classes=100)


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
