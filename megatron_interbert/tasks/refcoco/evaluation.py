"""Run `evaluate refcoco`."""

from typing import Any

import torch

from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.grounding.evaluation import evaluate_regions
from megatron_interbert.tasks.refcoco.config import EvaluateRefcocoConfig
from megatron_interbert.tasks.refcoco.job import REFCOCO
from megatron_interbert.tasks.refcoco.refs import read_expressions
from megatron_interbert.tasks.results import Published

VOLTA = "e-bug/volta, MODELS.md (pretrained on Conceptual Captions alone)"
MATTNET = "lichengunc/MAttNet, README.md"
PUBLISHED = (
    Published("refcoco+", "VOLTA UNITER", {"accuracy_det": 71.45}, VOLTA),
    Published("refcoco+", "VOLTA ViLBERT", {"accuracy_det": 70.53}, VOLTA),
    Published("refcoco+", "MAttNet", {"accuracy_det": 65.33}, MATTNET, "val"),
    Published(
        "refcocog", "12-in-1", {"accuracy_det": 76.35}, "wizwand.com, list of results", "test"
    ),
)


def evaluate_refcoco(
    config: EvaluateRefcocoConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the chosen boxes; return the result.

    All ranks of a launch must call it.
    """
    return evaluate_regions(
        REFCOCO,
        config,
        state,
        device,
        [config.refs, config.instances],
        lambda stores: read_expressions(
            config.refs, config.instances, config.split, stores, config.submission
        ),
        PUBLISHED,
    )
