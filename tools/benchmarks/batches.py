"""Make random samples of realistic sizes, and pad them as other implementations do."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.packing import Example
from megatron_interbert.model.presets import load_model_config

IGNORED = -100  # label of positions that are not targets
ANSWERS = 3129  # of VQA


def sizes_of(model: str) -> ModelConfig:
    """Return the sizes of a preset or JSON file, with small ones for those taken from the data."""
    sizes = load_model_config(model)
    if sizes.vocab_size and sizes.feature_dim and sizes.num_classes:
        return sizes
    return dataclasses.replace(sizes, vocab_size=1000, feature_dim=64, num_classes=100)


def questions(examples: Sequence[Example]) -> list[Example]:
    """Return samples as questions with their own images: nothing is masked or mismatched."""
    nothing = np.zeros(0, np.int64)
    return [
        dataclasses.replace(
            example,
            hidden_regions=np.zeros(len(example.features), bool),
            msm_positions=nothing,
            msm_labels=nothing,
            mismatched=0,
        )
        for example in examples
    ]


def answers_of(examples: Sequence[Example]) -> np.ndarray:
    """Return the number of the right answer to each of some questions, int64 [B]: any, but always
    the same.
    """
    return np.array([int(example.token_ids.sum()) % ANSWERS for example in examples])


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
    answers: torch.Tensor  # float32 [B, ANSWERS], the score of each answer


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
        F.one_hot(torch.from_numpy(answers_of(examples)), ANSWERS).float(),
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
