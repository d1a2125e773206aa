"""Count the FLOPs of a training step from the real tokens of a batch (2 per multiply-add)."""

from dataclasses import dataclass

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.packing import PackedBatch


@dataclass(frozen=True)
class Tokens:
    """Count a micro-batch's tokens: of texts, of images ([IMG] and regions), samples, those that
    the last layers are computed for, and the sums of squared lengths, which attention costs.
    """

    text: float
    image: float
    samples: float
    pictures: float  # samples with an image
    words: float  # masked
    regions: float  # masked, of matched pairs
    text_squares: float
    image_squares: float
    joint_squares: float

    @classmethod
    def of(cls, batch: PackedBatch) -> "Tokens":
        """Count those of a batch."""
        text = (batch.text_offsets[1:] - batch.text_offsets[:-1]).double()
        image = (batch.image_offsets[1:] - batch.image_offsets[:-1]).double()

        return cls(
            float(text.sum()),
            float(image.sum()),
            len(batch),
            len(batch.summary_rows),
            len(batch.msm_positions),
            len(batch.mrm_positions),
            float((text**2).sum()),
            float((image**2).sum()),
            float(((text + image) ** 2).sum()),
        )

    def stacks(self, sizes: ModelConfig) -> list[tuple[int, float, float, float | None]]:
        """Return (layers, tokens, sum of squared lengths, tokens that leave the last layer; None:
        all) of each stack.
        """
        read = (self.samples + self.words, self.pictures + self.regions)
        return [
            (sizes.interaction_layers, self.text + self.image, self.joint_squares, None),
            (sizes.text_layers, self.text, self.text_squares, read[0]),
            (sizes.image_layers, self.image, self.image_squares, read[1]),
        ]


def training_flops(config: ModelConfig, batch: PackedBatch) -> float:
    """Return the FLOPs of forward and backward pass (3 x forward) of a batch, matrix products
    only.
    """
    return 3 * forward_flops(config, Tokens.of(batch))


def forward_flops(config: ModelConfig, tokens: Tokens) -> float:
    """Return the FLOPs of a forward pass; in the last layer of a stream only QKV and attention see
    all tokens, the rest only those that are read.
    """
    hidden = config.hidden_size
    total = 0.0

    for stack, (layers, count, squares, read) in zip(
        config.STACKS, tokens.stacks(config), strict=True
    ):
        behind = count * layers if read is None or not layers else count * (layers - 1) + read
        total += layers * (2 * hidden * 3 * hidden * count + 4 * hidden * squares)
        inner = 2 * config.ffn_hidden_size
        if config.has_experts(stack):  # one expert of each prototype, and the router
            inner = config.prototypes * inner + config.experts
        total += 2 * hidden * (hidden + inner) * behind

    total += 2 * hidden * (config.feature_dim + 5) * tokens.image
    total += 2 * hidden * (hidden + config.padded_vocab_size) * tokens.words
    total += 2 * hidden * (hidden + config.num_classes) * tokens.regions
    total += 2 * config.pooled_size * (2 * hidden + 2) * tokens.samples

    return total
