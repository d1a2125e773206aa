"""Define NLVR2: the finetuning job, the official metrics, and the file for the server."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_interbert.config.stores import split_paths
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.job import Answering, answer_job, open_run, open_valid
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.answering.vocabulary import AnswerList
from megatron_interbert.tasks.nlvr2.config import Nlvr2Config
from megatron_interbert.tasks.nlvr2.samples import CLASSES, read_statements
from megatron_interbert.tasks.task import Job


def nlvr2_metrics(records: Sequence[Record], given: Sequence[str]) -> dict[str, float]:
    """Return, in percent, the accuracy and the consistency: the share of statements that are judged
    rightly of all their pairs of images.
    """
    right = [answer in record.answers for record, answer in zip(records, given, strict=True)]
    groups: dict[str, list[bool]] = defaultdict(list)
    for record, hit in zip(records, right, strict=True):
        groups[record.facts].append(hit)

    return {
        "accuracy": 100.0 * float(np.mean(right)),
        "consistency": 100.0 * float(np.mean([all(hits) for hits in groups.values()])),
    }


NLVR2 = Answering("nlvr2", nlvr2_metrics, ("accuracy", "consistency"), images=2)


def nlvr2_job(config: Nlvr2Config, state: ParallelState) -> Job:
    """Build the job that finetunes on --annotations; the accuracy on --valid-annotations decides
    which checkpoint is best.
    """
    opened = open_run(config)
    paths = split_paths(config.annotations)
    records = read_statements(paths, opened.corpus)
    valid = None

    if valid_paths := split_paths(config.valid_annotations):
        corpus = open_valid(config, opened.corpus)
        valid = (read_statements(valid_paths, corpus), corpus)

    task = replace(NLVR2, side_by_side=config.triplet)

    return answer_job(task, config, state, opened, AnswerList(CLASSES), records, paths, valid)


def submission(records: Sequence[Record], given: Sequence[str]) -> str:
    """Return the CSV of the test server: the judgement of each statement."""
    lines = [f"{record.id},{answer}" for record, answer in zip(records, given, strict=True)]
    return "\n".join(lines) + "\n"
