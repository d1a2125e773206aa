"""Define the grounding of phrases: the finetuning job, and recall."""

from collections.abc import Sequence

import numpy as np

from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.flickr30k_entities.config import EntitiesConfig
from megatron_interbert.tasks.flickr30k_entities.samples import read_phrases
from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.grounding.job import Pointing, open_run, open_valid, region_job
from megatron_interbert.tasks.grounding.prediction import Ranked
from megatron_interbert.tasks.grounding.records import RegionRecord
from megatron_interbert.tasks.task import Job

LEAST = 0.5  # IoU that a right box must have
FIRST = (1, 5, 10)


def entities_metrics(
    records: Sequence[RegionRecord], ranked: Sequence[Ranked], convention: str
) -> dict[str, float]:
    """Return the share of phrases with a right box among the first 1, 5 and 10, in percent."""
    places = np.array(
        [
            first_right(overlaps(best.boxes, record.targets, convention).max(axis=1))
            for record, best in zip(records, ranked, strict=True)
        ]
    )
    return {f"R@{k}": 100.0 * float((places < k).mean()) for k in FIRST}


def first_right(shares: np.ndarray) -> int:
    """Return the place of the first box with a sufficient IoU; beyond all if there is none."""
    right = np.flatnonzero(shares >= LEAST)
    return int(right[0]) if len(right) else max(FIRST)


ENTITIES = Pointing(
    "flickr30k_entities", entities_metrics, tuple(f"R@{k}" for k in FIRST), most=max(FIRST)
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
