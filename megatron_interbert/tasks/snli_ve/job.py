"""Define SNLI-VE: the finetuning job, accuracies, and the file of predictions."""

import json
from collections.abc import Sequence

import numpy as np

from megatron_interbert.config.stores import split_paths
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.job import Answering, answer_job, open_run, open_valid
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.answering.vocabulary import AnswerList
from megatron_interbert.tasks.snli_ve.config import SnliVeConfig
from megatron_interbert.tasks.snli_ve.samples import CLASSES, read_pairs
from megatron_interbert.tasks.task import Job


def snli_ve_metrics(records: Sequence[Record], given: Sequence[str]) -> dict[str, float]:
    """Return the accuracy in percent, over all and of each class."""
    right = np.array([a in record.answers for record, a in zip(records, given, strict=True)])
    labels = np.array([next(iter(record.answers)) for record in records])
    of_class = {name: right[labels == name] for name in CLASSES}
    means = {name: 100.0 * float(some.mean()) for name, some in of_class.items() if len(some)}

    return {"accuracy": 100.0 * float(right.mean()), **means}


SNLI_VE = Answering("snli_ve", snli_ve_metrics)


def snli_ve_job(config: SnliVeConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on --annotations; the accuracy on --valid-annotations decides
    which checkpoint is best.
    """
    opened = open_run(config)
    paths = split_paths(config.annotations)
    records = read_pairs(paths, opened.corpus)
    valid = None

    if valid_paths := split_paths(config.valid_annotations):
        corpus = open_valid(config, opened.corpus)
        valid = (read_pairs(valid_paths, corpus), corpus)

    return answer_job(SNLI_VE, config, state, opened, AnswerList(CLASSES), records, paths, valid)


def predictions(records: Sequence[Record], given: Sequence[str]) -> str:
    """Return the JSON lines of the predicted labels."""
    return "".join(
        json.dumps({"pairID": record.id, "prediction": label}) + "\n"
        for record, label in zip(records, given, strict=True)
    )
