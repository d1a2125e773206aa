"""Run `evaluate guesswhat_guesser` and `evaluate guesswhat_oracle`."""

from typing import Any

import torch

from megatron_interbert.config.stores import split_paths
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.evaluation import evaluate_answers
from megatron_interbert.tasks.grounding.evaluation import evaluate_regions
from megatron_interbert.tasks.guesswhat.config import EvaluateGuesserConfig, EvaluateOracleConfig
from megatron_interbert.tasks.guesswhat.guesser import GUESSER, read_dialogues
from megatron_interbert.tasks.guesswhat.oracle import ORACLE, predictions, read_turns


def evaluate_guesser(
    config: EvaluateGuesserConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the chosen boxes; return the result.

    All ranks of a launch must call it.
    """
    paths = split_paths(config.games)

    return evaluate_regions(
        GUESSER,
        config,
        state,
        device,
        paths,
        lambda stores: read_dialogues(paths, stores, config.submission),
    )


def evaluate_oracle(
    config: EvaluateOracleConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the answers; return the result.

    All ranks of a launch must call it.
    """
    paths = split_paths(config.games)

    return evaluate_answers(
        ORACLE,
        config,
        state,
        device,
        paths,
        lambda corpus: read_turns(paths, corpus, config.submission),
        ("predictions.jsonl", predictions),
    )
