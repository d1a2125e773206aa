"""Run `evaluate visual7w`."""

from typing import Any

import torch

from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.grounding.evaluation import evaluate_regions
from megatron_interbert.tasks.visual7w.config import EvaluateVisual7wConfig
from megatron_interbert.tasks.visual7w.job import VISUAL7W
from megatron_interbert.tasks.visual7w.samples import read_questions


def evaluate_visual7w(
    config: EvaluateVisual7wConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the chosen boxes; return the result.

    All ranks of a launch must call it.
    """
    return evaluate_regions(
        VISUAL7W,
        config,
        state,
        device,
        [config.dataset],
        lambda stores: read_questions(config.dataset, config.split, stores, config.submission),
    )
