"""Define the grounding of phrases: the finetuning job, and when a box is right."""

from functools import partial

import numpy as np

from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.flickr30k_entities.config import EntitiesConfig
from megatron_interbert.tasks.flickr30k_entities.samples import read_phrases
from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.grounding.figures import recalls
from megatron_interbert.tasks.grounding.job import Pointing, open_run, open_valid, region_job
from megatron_interbert.tasks.grounding.records import RegionRecord
from megatron_interbert.tasks.task import Job

LEAST = 0.5  # IoU that a right box must have
FIRST = (1, 5, 10)


def is_right(record: RegionRecord, boxes: np.ndarray, convention: str) -> np.ndarray:
    """Return whether boxes [n, 4] have an IoU of 0.5 or more with a box of the phrase, bool [n]."""
    return overlaps(boxes, record.targets, convention).max(axis=1) >= LEAST


ENTITIES = Pointing(
    "flickr30k_entities",
    is_right,
    partial(recalls, FIRST),
    tuple(f"R@{k}" for k in FIRST),
    most=max(FIRST),
)


def entities_job(config: EntitiesConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on the phrases of --images; R@1 on those of --valid-images
    decides which checkpoint is best.
    """
    opened = open_run(config)
    how = (config.context, config.several == "merged")
    records = read_phrases(config.entities, config.images, opened.stores, *how)
    valid = None

    if config.valid_images:
        stores = open_valid(config, opened.stores)
        valid = (read_phrases(config.entities, config.valid_images, stores, *how), stores)

    return region_job(ENTITIES, config, state, opened, records, [config.images], valid)
