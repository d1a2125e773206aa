"""Define the presets of `--model`, and read model sizes from a JSON file."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_interbert.config.model import ModelConfig, model_config_from_dict
from megatron_interbert.config.options import nearest
from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_json

# The small presets take vocabulary, features and classes from the data. Their first weights are
# wider, so that a layer's share of the signal at width 64 (0.1 x sqrt(64) = 0.8) is about that of
# base (0.02 x sqrt(768) = 0.55); with less, attention learns nothing for a long time.
SMALL = ModelConfig(
    vocab_size=0,
    feature_dim=0,
    num_classes=0,
    hidden_size=64,
    interaction_layers=2,
    text_layers=1,
    image_layers=1,
    num_attention_heads=4,
    image_attention_heads=4,
    ffn_hidden_size=256,
    pooled_size=256,
    max_position_embeddings=64,
    initializer_range=0.1,
)


def m6(
    interaction: int,
    stream: int,
    hidden: int = 1024,
    heads: int = 16,
    ffn: int = 4096,
    experts: int = 0,
) -> ModelConfig:
    """Return the sizes of a model of M6's line with `interaction` layers and two streams of
    `stream` layers.
    """
    return ModelConfig(
        vocab_size=21128,
        hidden_size=hidden,
        interaction_layers=interaction,
        text_layers=stream,
        image_layers=stream,
        num_attention_heads=heads,
        image_attention_heads=heads,
        ffn_hidden_size=ffn,
        pooled_size=hidden,
        text_normalisation="chinese",
        experts=experts,
    )


PRESETS = {
    "tiny": dataclasses.replace(SMALL, ffn_hidden_size=128, pooled_size=64),  # tests
    # the generated sample corpus: learns in minutes on two cores
    "sample": SMALL.without_dropout(),
    "base": ModelConfig(),  # the official sizes, 157.0 M parameters
    # the generated shop
    "sample-chinese": dataclasses.replace(SMALL.without_dropout(), text_normalisation="chinese"),
    "base-chinese": ModelConfig(vocab_size=21128, text_normalisation="chinese"),
    "large": ModelConfig(
        hidden_size=1024,
        interaction_layers=12,
        text_layers=12,
        image_layers=12,
        num_attention_heads=16,
        image_attention_heads=16,
        ffn_hidden_size=4096,
    ),
    # M6's line; how it divides layers over the interaction module and the streams is not known, so
    # the split is ours
    "m6-10b-dense": m6(26, 12, hidden=4096, heads=32, ffn=16384),
    "m6-1.4b": m6(3, 1, experts=32),
    "m6-10b": m6(4, 3, experts=128),
    "m6-100b": m6(12, 6, experts=512),
    "m6-1t": m6(12, 6, experts=960, ffn=21248),
}


def load_model_config(model: str) -> ModelConfig:
    """Return the sizes of a preset or JSON file; raises UsageError for an unknown name or key."""
    if model in PRESETS:
        return PRESETS[model]
    if model.endswith(".json") or Path(model).is_file():
        return model_config_from_dict(read_json(model, "--model"), model)

    raise UsageError(
        f"--model {model}: no such preset or file{nearest(model, PRESETS)}; presets:"
        f" {', '.join(PRESETS)}"
    )


def with_experts(
    config: ModelConfig, experts: int = 0, prototypes: int = 0, share_layers: bool = False
) -> ModelConfig:
    """Return a model with other experts, prototypes or layers, as flags give them; 0 and False
    leave it as it is. Raises UsageError if they do not fit together.
    """
    flags = {"experts": experts, "prototypes": prototypes, "share_layers": share_layers}
    given: dict[str, Any] = {name: value for name, value in flags.items() if value}

    try:
        return dataclasses.replace(config, **given)
    except UsageError as error:
        raise UsageError(f"--experts, --prototypes: {error}") from None


def with_usual_data(config: ModelConfig) -> tuple[ModelConfig, str]:
    """Return (a model whose sizes of 0 are those of base's data, a note that says so or ""), for
    predictions without data.
    """
    base = PRESETS["base"]
    missing = [name for name in ModelConfig.FROM_DATA if not getattr(config, name)]
    if not missing:
        return config, ""

    usual = {name: getattr(base, name) for name in missing}
    told = ", ".join(f"{name} {value}" for name, value in usual.items())

    return dataclasses.replace(config, **usual), f"note: the data are not known; taken: {told}"


def check_words(config: ModelConfig, most: int) -> None:
    """Raise UsageError if samples of `most` words do not fit a model's positions."""
    if most > config.max_position_embeddings:
        raise UsageError(
            f"--words up to {most}: the model has {config.max_position_embeddings} positions"
        )


def fit_to_data(
    config: ModelConfig, vocab_size: int, feature_dim: int, num_classes: int, where: str
) -> ModelConfig:
    """Fill in sizes of 0 from the data; raises UsageError if another size disagrees with them."""
    found = {"vocab_size": vocab_size, "feature_dim": feature_dim, "num_classes": num_classes}
    for name, value in found.items():
        expected = getattr(config, name)
        if expected not in (0, value):
            raise UsageError(
                f"{where}: {name} is {value}, but the model has {expected};"
                " use the data or the vocabulary that the model was made for, or another --model"
            )

    return dataclasses.replace(config, **found)
