"""Define pointing in Visual7W: the finetuning job, and the share of right boxes."""

from collections.abc import Sequence

import numpy as np

from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.grounding.job import Pointing, open_run, open_valid, region_job
from megatron_interbert.tasks.grounding.prediction import Ranked
from megatron_interbert.tasks.grounding.records import RegionRecord
from megatron_interbert.tasks.grounding.samples import ALL
from megatron_interbert.tasks.task import Job
from megatron_interbert.tasks.visual7w.config import Visual7wConfig
from megatron_interbert.tasks.visual7w.samples import read_questions


def visual7w_metrics(
    records: Sequence[RegionRecord], ranked: Sequence[Ranked], convention: str
) -> dict[str, float]:
    """Return the share of questions whose best region is nearer to the right box than to the other
    choices, in percent.
    """
    right = [
        overlaps(best.boxes[:1], record.choices, convention)[0].argmax() == record.facts
        for record, best in zip(records, ranked, strict=True)
    ]
    return {"accuracy": 100.0 * float(np.mean(right))}


VISUAL7W = Pointing("visual7w", visual7w_metrics, among=ALL)


def visual7w_job(config: Visual7wConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on --split of --dataset; the accuracy on --valid-split decides
    which checkpoint is best.
    """
    opened = open_run(config)
    records = read_questions(config.dataset, config.split, opened.stores)
    valid = None

    if config.valid_split:
        stores = open_valid(config, opened.stores)
        valid = (read_questions(config.dataset, config.valid_split, stores), stores)

    return region_job(VISUAL7W, config, state, opened, records, [config.dataset], valid)
