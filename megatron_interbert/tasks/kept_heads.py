"""Load a checkpoint with the head that it has for a task."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.model.heads import TaskHead
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.config import EvaluateConfig
from megatron_interbert.tasks.loading import load_model
from megatron_interbert.weights.sources import WeightSource


def kept_head(name: str, source: WeightSource) -> dict[str, Any]:
    """Return what a checkpoint has kept of the head of a task.

    Raises UsageError if it has none.
    """
    heads = source.facts.get("task_heads") or {}
    if name not in heads:
        had = f"heads for {', '.join(heads)}" if heads else "no head of a task"
        raise UsageError(
            f"--load {source.path}: has {had}; finetune it first: interbert finetune {name}"
            f" --init-from {source.path}"
        )

    return heads[name]


def load_with_head(
    name: str,
    head_of: Callable[[Mapping[str, Any]], TaskHead],
    config: EvaluateConfig,
    state: ParallelState,
    device: torch.device,
) -> tuple[InterBert, WeightSource]:
    """Load the model of --load with its head for a task, which follows from what the checkpoint
    has kept of it; return it with the source of its weights.

    Raises UsageError if the checkpoint has no such head.
    """
    return load_model(
        config.load,
        (),
        config.kernels,
        device,
        state,
        config.averaged,
        config.precision,
        options_of=lambda source: {"task_heads": {name: head_of(kept_head(name, source))}},
    )
