"""InterBertConfig: the sizes of ModelConfig as a Hugging Face configuration, under the same
names.
"""

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError

FIELDS = dataclasses.fields(ModelConfig)


class InterBertConfig(PreTrainedConfig):
    """Every field of ModelConfig with its default, beside Hugging Face's own (num_labels, dtype,
    ..).

    UsageError names the key of a value that no model can have. A vocabulary size, feature width or
    class count of 0, which asks training to take it from the data, is refused too: a model in a
    folder is a whole one.
    """

    model_type = "interbert"

    def __init__(self, **kwargs: Any) -> None:
        for field in FIELDS:
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        super().__init__(**kwargs)
        self.model_config()

    # it makes dataclasses of its subclasses, whose own would not see our fields
    __eq__ = PreTrainedConfig.__eq__

    @classmethod
    def from_model_config(cls, model_config: ModelConfig, **extra: Any) -> "InterBertConfig":
        """Give the configuration of a model of ours.

        `extra` are Hugging Face's keys, such as num_labels.
        """
        return cls(**dataclasses.asdict(model_config), **extra)

    def model_config(self) -> ModelConfig:
        """Give our own sizes; UsageError for wrong values, also those set after construction."""
        sizes = ModelConfig(**{field.name: getattr(self, field.name) for field in FIELDS})

        for name in ModelConfig.FROM_DATA:
            if not getattr(sizes, name):
                raise UsageError(
                    f"model: {name} is 0, expected the size of a whole model: 1 or more"
                )

        return sizes
