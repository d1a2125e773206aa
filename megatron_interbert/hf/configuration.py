"""InterBertConfig: the sizes of ModelConfig as a Hugging Face configuration, under the same names."""

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from megatron_interbert.config import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.weights.sources import MOST_LAYERS

FIELDS = dataclasses.fields(ModelConfig)


class InterBertConfig(PreTrainedConfig):
    """Every field of ModelConfig with its default, beside Hugging Face's own (num_labels, dtype, ..).

    UsageError names the key of a value that no model can have. A vocabulary size, feature width or class count of 0, which
    asks training to take it from the data, is refused too: a model in a folder is a whole one.
    """

    model_type = "interbert"

    def __init__(self, **kwargs: Any) -> None:
        for field in FIELDS:
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        super().__init__(**kwargs)
        self.model_config()

    __eq__ = PreTrainedConfig.__eq__  # it makes dataclasses of its subclasses, whose own would not see our fields

    @classmethod
    def from_model_config(cls, model_config: ModelConfig, **extra: Any) -> "InterBertConfig":
        """The configuration of a model of ours; `extra` are Hugging Face's keys, such as num_labels."""
        return cls(**dataclasses.asdict(model_config), **extra)

    def model_config(self) -> ModelConfig:
        """Our own sizes; UsageError for wrong values, also those set after construction."""
        values = {field.name: checked(field.name, getattr(self, field.name), field.type) for field in FIELDS}
        return ModelConfig(**values)


def checked(name: str, value: Any, kind: type) -> Any:
    """The value of a field as its type; UsageError when it has another type or lies outside what it can be."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (isinstance(value, kind) or (kind is float and number)) or isinstance(value, bool):
        raise UsageError(f"config: {name} is {value!r}, expected {kind.__name__}")
    least = 0 if kind is float or name.endswith("_layers") else 1
    if number and value < least:
        raise UsageError(f"config: {name} is {value!r}, expected {least} or more")
    if name.endswith("_layers") and value > MOST_LAYERS:
        raise UsageError(f"config: {name} is {value!r}, expected {MOST_LAYERS} or fewer")
    if name.endswith("dropout") and value >= 1:
        raise UsageError(f"config: {name} is {value!r}, expected a share from 0 to below 1")
    return kind(value)
