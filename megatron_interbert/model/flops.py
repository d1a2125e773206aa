"""Floating-point operations of a training step, counted from the real tokens of a batch (2 per multiply-add)."""

import torch

from megatron_interbert.config import ModelConfig
from megatron_interbert.data.packing import PackedBatch


def training_flops(config: ModelConfig, batch: PackedBatch) -> float:
    """FLOPs of forward and backward (three times the forward pass) for one packed batch, matrix products only."""
    text = (batch.text_offsets[1:] - batch.text_offsets[:-1]).double()
    image = (batch.image_offsets[1:] - batch.image_offsets[:-1]).double()
    hidden = config.hidden_size

    def stack(layers: int, lengths: torch.Tensor) -> float:
        projections = 2 * hidden * (4 * hidden + 2 * config.ffn_hidden_size) * float(lengths.sum())
        return layers * (projections + 4 * hidden * float((lengths**2).sum()))

    forward = stack(config.interaction_layers, text + image) + stack(config.text_layers, text) + stack(config.image_layers, image)
    forward += 2 * hidden * (config.feature_dim + 5) * float(image.sum())
    forward += 2 * hidden * (hidden + config.padded_vocab_size) * len(batch.msm_labels)
    forward += 2 * hidden * (hidden + config.num_classes) * len(batch.mrm_positions)
    forward += 2 * config.pooled_size * (2 * hidden + 2) * len(batch)
    return 3 * forward
