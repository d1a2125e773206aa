"""Run `evaluate flickr30k_entities`."""

from typing import Any

import torch

from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.flickr30k_entities.config import EvaluateEntitiesConfig
from megatron_interbert.tasks.flickr30k_entities.job import ENTITIES
from megatron_interbert.tasks.flickr30k_entities.samples import read_phrases
from megatron_interbert.tasks.grounding.evaluation import evaluate_regions


def evaluate_entities(
    config: EvaluateEntitiesConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the chosen boxes; return the result.

    All ranks of a launch must call it.
    """
    return evaluate_regions(
        ENTITIES,
        config,
        state,
        device,
        [config.images],
        lambda stores: read_phrases(
            config.entities,
            config.images,
            stores,
            config.context,
            config.several == "merged",
            config.submission,
        ),
    )
