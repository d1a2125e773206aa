"""Count the FLOPs of a training step from the real tokens of a batch (2 per multiply-add)."""

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.packing import PackedBatch


def training_flops(config: ModelConfig, batch: PackedBatch) -> float:
    """Return the FLOPs of forward and backward pass (3 x forward) of a batch, matrix products
    only.
    """
    text = (batch.text_offsets[1:] - batch.text_offsets[:-1]).double()
    image = (batch.image_offsets[1:] - batch.image_offsets[:-1]).double()
    hidden = config.hidden_size

    def stack(layers: int, lengths: torch.Tensor, read: float | None = None) -> float:
        """Count layers over sequences; in the last one, only QKV and attention see all tokens, the
        rest only the `read` ones.
        """
        tokens = float(lengths.sum())
        attention = layers * (
            2 * hidden * 3 * hidden * tokens + 4 * hidden * float((lengths**2).sum())
        )
        behind = tokens * layers if read is None or not layers else tokens * (layers - 1) + read

        return attention + 2 * hidden * (hidden + 2 * config.ffn_hidden_size) * behind

    words = len(batch.msm_labels)
    regions = len(batch.mrm_positions)
    forward = stack(config.interaction_layers, text + image)
    forward += stack(config.text_layers, text, words + len(batch))
    forward += stack(config.image_layers, image, regions + len(batch.summary_rows))
    forward += 2 * hidden * (config.feature_dim + 5) * float(image.sum())
    forward += 2 * hidden * (hidden + config.padded_vocab_size) * words
    forward += 2 * hidden * (hidden + config.num_classes) * regions
    forward += 2 * config.pooled_size * (2 * hidden + 2) * len(batch)

    return 3 * forward
