"""Define InterBertConfig: the sizes of ModelConfig, by the same names, for Hugging Face."""

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError

FIELDS = dataclasses.fields(ModelConfig)


class InterBertConfig(PreTrainedConfig):
    """Hold every field of ModelConfig, with its default, beside Hugging Face's own (num_labels,
    dtype, ..).

    Raises UsageError that names the key of a value that no model can have. A vocabulary size,
    feature size or number of classes of 0, which has training take it from the data, is refused
    too: a saved model has all its sizes.
    """

    model_type = "interbert"

    def __init__(self, **kwargs: Any) -> None:
        for field in FIELDS:
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        super().__init__(**kwargs)
        self.model_config()

    # transformers turns subclasses into dataclasses, whose __eq__ would ignore our fields
    __eq__ = PreTrainedConfig.__eq__

    @classmethod
    def from_model_config(cls, model_config: ModelConfig, **extra: Any) -> "InterBertConfig":
        """Return the configuration of one of our models; `extra` holds Hugging Face's keys, such as
        num_labels.
        """
        return cls(**dataclasses.asdict(model_config), **extra)

    def model_config(self) -> ModelConfig:
        """Return our own sizes; raises UsageError for wrong values, even if set later."""
        sizes = ModelConfig(**{field.name: getattr(self, field.name) for field in FIELDS})

        for name in ModelConfig.FROM_DATA:
            if not getattr(sizes, name):
                raise UsageError(
                    f"model: {name} is 0, expected the size of a whole model: 1 or more"
                )

        return sizes
