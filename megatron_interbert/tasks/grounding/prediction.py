"""Rank the regions that samples may choose, each data-parallel rank a share of the samples."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.sending import send_batch
from megatron_interbert.errors import UsageError, local_errors
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.grounding.samples import RegionSamples, Shown
from megatron_interbert.tasks.grounding.task import NOTHING, in_rows


@dataclass
class Ranked:
    """Hold the best regions of a sample, best first: boxes float64 [k, 4] in pixels of the
    annotations, and their scores float32 [k].
    """

    boxes: np.ndarray
    scores: np.ndarray


@torch.no_grad()
def rank_regions(
    model: InterBert,
    samples: RegionSamples,
    state: ParallelState,
    device: torch.device,
    batch_size: int,
    most: int = 1,
    progress: Callable[[int], None] = lambda samples: None,
) -> list[Ranked]:
    """Return the `most` best regions of every sample; of equal scores the first region is best.

    All ranks return the same. Raises UsageError if the model gives scores that are not finite.
    """
    mine = np.argsort(samples.lengths(), kind="stable")[state.data_rank :: state.data_size]
    tables = []
    shown_boxes = []

    for start in range(0, len(mine), batch_size):
        rows = mine[start : start + batch_size]
        with local_errors():
            fields, shown = samples.fields(rows)

        batch = send_batch(to_batch(fields), device)
        logits = model(batch).task_outputs[samples.head]
        tables.append(in_rows(logits, batch, NOTHING))
        shown_boxes.append((shown, len(rows)))
        progress(len(rows))

    ranked = [
        entry
        for table, (shown, count) in zip(tables, shown_boxes, strict=True)
        for entry in ranked_rows(table.cpu().numpy(), shown, count, most)
    ]
    everything: dict[int, Ranked] = {}
    for rows, entries in state.gather((mine.tolist(), ranked)):
        everything |= dict(zip(rows, entries, strict=True))

    found = [everything[row] for row in range(len(samples))]
    if not all(np.isfinite(ranked.scores).all() for ranked in found):
        raise UsageError(
            "the model gives scores that are not finite, so nothing can be chosen; evaluate another"
            " checkpoint"
        )

    return found


def ranked_rows(table: np.ndarray, shown: Shown, count: int, most: int) -> list[Ranked]:
    """Return the best regions of each of `count` samples from their scores [count, places]."""
    found = []
    for row in range(count):
        boxes = shown.boxes[shown.owner == row]
        scores = table[row, : len(boxes)]
        best = np.argsort(-scores, kind="stable")[:most]
        found.append(Ranked(boxes[best], scores[best]))

    return found
