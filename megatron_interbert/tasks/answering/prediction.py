"""Predict the answers of many samples, each data-parallel rank a share of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.sending import send_batch
from megatron_interbert.errors import UsageError, local_errors
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.samples import AnswerSamples


@dataclass
class Predictions:
    """Hold the most likely answers of n samples, best first: numbers int64 [n, k], and their
    probabilities float32 [n, k].
    """

    numbers: np.ndarray
    probabilities: np.ndarray


@torch.no_grad()
def predict(
    model: InterBert,
    samples: AnswerSamples,
    soft: bool,
    state: ParallelState,
    device: torch.device,
    batch_size: int,
    most: int = 1,
    progress: Callable[[int], None] = lambda samples: None,
) -> Predictions:
    """Return the `most` most likely answers of all samples; probabilities of `soft` answers are
    independent of each other.

    All ranks return the same. Raises UsageError if the model gives scores that are not finite.
    """
    mine = np.argsort(samples.lengths(), kind="stable")[state.data_rank :: state.data_size]
    found = []

    for start in range(0, len(mine), batch_size):
        rows = mine[start : start + batch_size]
        with local_errors():
            fields = samples.fields(rows)

        logits = model(send_batch(to_batch(fields), device)).task_outputs[samples.head]
        shares = logits.sigmoid() if soft else logits.softmax(dim=1)
        # of equal ones the first: a stable order, which topk does not promise
        best = logits.sort(dim=1, descending=True, stable=True).indices[:, :most]
        found.append((best, shares.gather(1, best)))
        progress(len(rows))

    parts = [[part.cpu().numpy() for part in parts] for parts in zip(*found, strict=True)]
    own = [np.concatenate(some) for some in parts] if found else None
    gathered = [(rows, values) for rows, values in state.gather((mine, own)) if values is not None]
    numbers, probabilities = (
        in_order(len(samples), [(rows, values[part]) for rows, values in gathered])
        for part in (0, 1)
    )
    if not np.isfinite(probabilities).all():
        raise UsageError(
            "the model gives scores that are not finite, so it answers nothing; evaluate another"
            " checkpoint"
        )

    return Predictions(numbers, probabilities)


def in_order(count: int, parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the values of all samples [count, ..] from (samples, values) of the ranks."""
    whole = np.empty((count, *parts[0][1].shape[1:]), parts[0][1].dtype)
    for rows, values in parts:
        whole[rows] = values

    return whole
