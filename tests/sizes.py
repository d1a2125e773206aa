"""Define the sizes of the small models that tests build."""

import dataclasses

from megatron_interbert.config.model import ModelConfig

# Chosen so that mixed-up sizes are noticed: no two that must differ are equal.
SMALL = ModelConfig(
    vocab_size=150,
    hidden_size=32,
    interaction_layers=2,
    text_layers=1,
    image_layers=2,
    num_attention_heads=4,
    image_attention_heads=2,
    ffn_hidden_size=48,
    pooled_size=24,
    feature_dim=20,
    num_classes=9,
    max_position_embeddings=40,
)
WIDER_WEIGHTS = dataclasses.replace(SMALL, initializer_range=0.1)  # so that signals reach the heads
DEEP_TEXT = dataclasses.replace(SMALL, text_layers=2, image_layers=1)
LIKE_BERT = dataclasses.replace(DEEP_TEXT, image_attention_heads=4)
FOR_EIGHT_RANKS = dataclasses.replace(DEEP_TEXT, image_attention_heads=8)

# The sizes behind the official model's recorded answers.
ORACLE = ModelConfig(
    vocab_size=199,
    hidden_size=48,
    interaction_layers=2,
    text_layers=2,
    image_layers=2,
    num_attention_heads=4,
    image_attention_heads=2,
    ffn_hidden_size=96,
    pooled_size=64,
    feature_dim=40,
    num_classes=23,
    max_position_embeddings=32,
)

# Large enough for tensors to stand out from the memory of Python and its libraries.
MEASURABLE = ModelConfig(
    vocab_size=3000,
    hidden_size=256,
    interaction_layers=3,
    text_layers=2,
    image_layers=2,
    num_attention_heads=4,
    image_attention_heads=4,
    ffn_hidden_size=1024,
    pooled_size=256,
    feature_dim=512,
    num_classes=100,
    max_position_embeddings=64,
)
