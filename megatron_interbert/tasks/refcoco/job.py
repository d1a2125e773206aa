"""Define referring expressions: the finetuning job, and the share of right boxes."""

from collections.abc import Sequence

import numpy as np

from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.grounding.job import Pointing, open_run, open_valid, region_job
from megatron_interbert.tasks.grounding.prediction import Ranked
from megatron_interbert.tasks.grounding.records import RegionRecord
from megatron_interbert.tasks.refcoco.config import RefcocoConfig
from megatron_interbert.tasks.refcoco.refs import read_expressions
from megatron_interbert.tasks.task import Job

LEAST = 0.5  # IoU that the chosen box must exceed


def refcoco_metrics(
    records: Sequence[RegionRecord], ranked: Sequence[Ranked], convention: str
) -> dict[str, float]:
    """Return the share of expressions whose best box has an IoU above 0.5, in percent."""
    right = [
        overlaps(best.boxes[:1], record.targets, convention).max() > LEAST
        for record, best in zip(records, ranked, strict=True)
    ]
    return {"accuracy": 100.0 * float(np.mean(right))}


REFCOCO = Pointing("refcoco", refcoco_metrics)


def refcoco_job(config: RefcocoConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on --split of --refs; the accuracy on --valid-split decides
    which checkpoint is best.
    """
    opened = open_run(config)
    records = read_expressions(config.refs, config.instances, config.split, opened.stores)
    valid = None

    if config.valid_split:
        stores = open_valid(config, opened.stores)
        judged = read_expressions(config.refs, config.instances, config.valid_split, stores)
        valid = (judged, stores)

    files = [config.refs, config.instances]

    return region_job(REFCOCO, config, state, opened, records, files, valid)
