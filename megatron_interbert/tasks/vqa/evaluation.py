"""Run `evaluate vqa`."""

from typing import Any

import torch

from megatron_interbert.config.stores import split_paths
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.evaluation import evaluate_answers
from megatron_interbert.tasks.results import Published
from megatron_interbert.tasks.vqa.config import EvaluateVqaConfig
from megatron_interbert.tasks.vqa.job import VQA, submission
from megatron_interbert.tasks.vqa.samples import read_annotations, read_questions

VOLTA = "e-bug/volta, MODELS.md (pretrained on Conceptual Captions alone)"
OSCAR = "microsoft/Oscar, MODEL_ZOO.md"
PUBLISHED = (
    Published("vqa-v2", "VOLTA UNITER", {"accuracy": 68.67}, VOLTA, "test-dev"),
    Published("vqa-v2", "VOLTA ViLBERT", {"accuracy": 68.97}, VOLTA, "test-dev"),
    Published("vqa-v2", "LXMERT", {"accuracy": 72.42}, "airsplay/lxmert, README.md", "test-dev"),
    Published("vqa-v2", "Oscar-B", {"accuracy": 73.44}, OSCAR, "test-standard"),
)


def evaluate_vqa(
    config: EvaluateVqaConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the server's file; return the result.

    All ranks of a launch must call it.
    """
    questions, annotations = split_paths(config.questions), split_paths(config.annotations)

    return evaluate_answers(
        VQA,
        config,
        state,
        device,
        [*questions, *annotations],
        lambda corpus: read_questions(
            questions, read_annotations(annotations), corpus, config.submission
        ),
        ("submission.json", submission),
        PUBLISHED,
    )
