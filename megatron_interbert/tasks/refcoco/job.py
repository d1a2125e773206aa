"""Define referring expressions: the finetuning job, and when a box is right."""

import numpy as np

from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.grounding.figures import accuracy
from megatron_interbert.tasks.grounding.job import Pointing, open_run, open_valid, region_job
from megatron_interbert.tasks.grounding.records import RegionRecord
from megatron_interbert.tasks.refcoco.config import RefcocoConfig
from megatron_interbert.tasks.refcoco.refs import read_expressions
from megatron_interbert.tasks.task import Job

LEAST = 0.5  # IoU that a right box must exceed


def is_right(record: RegionRecord, boxes: np.ndarray, convention: str) -> np.ndarray:
    """Return whether boxes [n, 4] have an IoU above 0.5 with the one that is meant, bool [n]."""
    return overlaps(boxes, record.targets, convention).max(axis=1) > LEAST


REFCOCO = Pointing("refcoco", is_right, accuracy)


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
