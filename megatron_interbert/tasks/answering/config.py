"""Declare the flags of all tasks that choose from a fixed list of answers."""

from dataclasses import dataclass
from typing import Any

from megatron_interbert.config.options import FREE, option, redefault, setting
from megatron_interbert.config.stores import split_paths
from megatron_interbert.tasks.config import (
    EvaluateConfig,
    FinetuneConfig,
    photos,
    store,
    training_store,
)


@dataclass
class AnswerConfig(FinetuneConfig):
    """Hold the settings shared by finetuning on tasks that choose one of fixed answers."""

    data_path: str = training_store("", "region store of the images, or several, comma-separated")
    valid_data_path: str = training_store(
        "", "region stores of the validation images, if they have their own"
    )
    global_batch_size: int = redefault(FinetuneConfig, "global_batch_size", 256)
    micro_batch_size: int = redefault(FinetuneConfig, "micro_batch_size", 32)

    def stores(self) -> list[str]:
        """List the region stores of --data-path."""
        return split_paths(self.data_path)

    def valid_stores(self) -> list[str]:
        """List the region stores of the validation images, by default those of --data-path."""
        return split_paths(self.valid_data_path) or self.stores()


@dataclass
class EvaluateAnswersConfig(EvaluateConfig):
    """Hold the settings shared by evaluations of tasks that choose one of fixed answers."""

    data_path: str = store("", "region store of the images, or several, comma-separated")
    max_regions: int = option(0, "regions per image", least=0, as_trained=36)
    image_folder: str = photos()
    batch_size: int = option(128, "samples per forward pass", least=1, group="scoring")
    submission: bool = option(
        False,
        "write the file for the benchmark's server; every sample must be usable",
        group="logging",
    )
    examples: int = option(60, "samples on the page", least=0, group="logging")

    def stores(self) -> list[str]:
        """List the region stores of --data-path."""
        return split_paths(self.data_path)


def files(help: str) -> Any:
    """Declare a flag that names official files to train on, comma-separated."""
    return setting("", help, FREE)


def tokens(default: int, help: str, room_for: str) -> Any:
    """Declare --max-tokens of a finetuning."""
    return redefault(FinetuneConfig, "max_tokens", default, help, room_for=room_for)


def evaluated_tokens(default: int, help: str, room_for: str) -> Any:
    """Declare --max-tokens of an evaluation."""
    return option(0, help, least=0, room_for=room_for, as_trained=default)
