"""Run `evaluate snli_ve`."""

from typing import Any

import torch

from megatron_interbert.config.stores import split_paths
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.evaluation import evaluate_answers
from megatron_interbert.tasks.results import Published
from megatron_interbert.tasks.snli_ve.config import EvaluateSnliVeConfig
from megatron_interbert.tasks.snli_ve.job import SNLI_VE, predictions
from megatron_interbert.tasks.snli_ve.samples import read_pairs

LIST = "wizwand.com, list of results"
PUBLISHED = (
    Published("snli-ve", "12-in-1", {"accuracy": 76.95}, LIST, "test"),
    Published("snli-ve", "UNITER-L", {"accuracy": 78.98}, LIST, "test"),
)


def evaluate_snli_ve(
    config: EvaluateSnliVeConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the predictions; return the result.

    All ranks of a launch must call it.
    """
    paths = split_paths(config.annotations)

    return evaluate_answers(
        SNLI_VE,
        config,
        state,
        device,
        paths,
        lambda corpus: read_pairs(paths, corpus, config.submission),
        ("predictions.jsonl", predictions),
        PUBLISHED,
    )
