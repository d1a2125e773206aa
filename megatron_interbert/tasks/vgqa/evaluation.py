"""Run `evaluate vgqa`."""

from typing import Any

import torch

from megatron_interbert.config.stores import split_paths
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.evaluation import evaluate_answers
from megatron_interbert.tasks.vgqa.config import EvaluateVgqaConfig
from megatron_interbert.tasks.vgqa.job import VGQA, predictions
from megatron_interbert.tasks.vgqa.samples import read_questions


def evaluate_vgqa(
    config: EvaluateVgqaConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the answers; return the result.

    All ranks of a launch must call it.
    """
    questions = split_paths(config.questions)

    return evaluate_answers(
        VGQA,
        config,
        state,
        device,
        questions,
        lambda corpus: read_questions(questions, "valid", config.minval, corpus, config.submission),
        ("predictions.json", predictions),
    )
