"""Run `evaluate nlvr2`."""

from typing import Any

import torch

from megatron_interbert.config.stores import split_paths
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.evaluation import evaluate_answers
from megatron_interbert.tasks.nlvr2.config import EvaluateNlvr2Config
from megatron_interbert.tasks.nlvr2.job import NLVR2, submission
from megatron_interbert.tasks.nlvr2.samples import read_statements
from megatron_interbert.tasks.results import Published

VOLTA = "e-bug/volta, MODELS.md (pretrained on Conceptual Captions alone)"
PUBLISHED = (
    Published("nlvr2", "VOLTA UNITER", {"accuracy": 73.73}, VOLTA, "test-P"),
    Published("nlvr2", "VOLTA ViLBERT", {"accuracy": 72.24}, VOLTA, "test-P"),
    Published("nlvr2", "LXMERT", {"accuracy": 74.45}, "airsplay/lxmert, README.md", "test-P"),
    Published("nlvr2", "Oscar-B", {"accuracy": 78.44}, "microsoft/Oscar, MODEL_ZOO.md", "test-P"),
)


def evaluate_nlvr2(
    config: EvaluateNlvr2Config, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the server's file; return the result.

    All ranks of a launch must call it.
    """
    paths = split_paths(config.annotations)

    return evaluate_answers(
        NLVR2,
        config,
        state,
        device,
        paths,
        lambda corpus: read_statements(paths, corpus, config.submission),
        ("submission.csv", submission),
        PUBLISHED,
    )
