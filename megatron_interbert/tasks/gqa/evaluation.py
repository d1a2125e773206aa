"""Run `evaluate gqa`."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from megatron_interbert.config.stores import split_paths
from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.evaluation import evaluate_answers
from megatron_interbert.tasks.gqa.config import EvaluateGqaConfig
from megatron_interbert.tasks.gqa.job import GQA, submission
from megatron_interbert.tasks.gqa.metrics import check_questions, gqa_metrics
from megatron_interbert.tasks.gqa.samples import read_choices, read_questions
from megatron_interbert.tasks.results import Published

PUBLISHED = (
    Published("gqa", "LXMERT", {"accuracy": 60.33}, "airsplay/lxmert, README.md", "test-standard"),
    Published(
        "gqa",
        "Oscar-B",
        {"accuracy": 61.62},
        "microsoft/Oscar, VinVL_MODEL_ZOO.md, row SoTA_B",
        "test-standard",
    ),
)


def evaluate_gqa(
    config: EvaluateGqaConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the server's file; return the result.

    All ranks of a launch must call it.
    """
    if config.balanced and config.consistency:
        raise UsageError(
            "--consistency and --balanced exclude each other: consistency needs the questions that"
            " --balanced leaves out"
        )

    questions = split_paths(config.questions)
    choices = read_choices(config.choices) if config.choices else None
    how = {"choices": choices, "consistency": config.consistency}
    task = replace(GQA, metrics=partial(gqa_metrics, **how), check=partial(check_questions, **how))

    return evaluate_answers(
        task,
        config,
        state,
        device,
        [*questions, *([config.choices] if config.choices else [])],
        lambda corpus: read_questions(questions, corpus, config.balanced, config.submission),
        ("submission.json", submission),
        PUBLISHED,
    )
