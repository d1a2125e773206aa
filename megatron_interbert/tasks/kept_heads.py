"""Read what a checkpoint has kept of the heads of its tasks."""

from typing import Any

from megatron_interbert.errors import UsageError
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
