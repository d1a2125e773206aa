"""Declare what commands can be told: options, settings of training runs, sizes of models."""

from megatron_interbert.config.model import ModelConfig, model_config_from_dict
from megatron_interbert.config.options import Flags, flag, nearest, option, redefault, setting
from megatron_interbert.config.training import RunConfig, TrainConfig

__all__ = [
    "Flags",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "flag",
    "model_config_from_dict",
    "nearest",
    "option",
    "redefault",
    "setting",
]
