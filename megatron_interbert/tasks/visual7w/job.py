"""Define pointing in Visual7W, and its finetuning job."""

from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.grounding.figures import accuracy, is_nearest
from megatron_interbert.tasks.grounding.job import Pointing, open_run, open_valid, region_job
from megatron_interbert.tasks.task import Job
from megatron_interbert.tasks.visual7w.config import Visual7wConfig
from megatron_interbert.tasks.visual7w.samples import read_questions

VISUAL7W = Pointing("visual7w", is_nearest, accuracy, apart=False)


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
