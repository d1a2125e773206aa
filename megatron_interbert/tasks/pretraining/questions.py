"""Read questions about the images to pretrain on, in the formats of tasks that have answers."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_interbert.config.options import nearest
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.config.yaml_file import key_of, read_mapping
from megatron_interbert.data.questions import Questions
from megatron_interbert.errors import UsageError
from megatron_interbert.model.heads import TaskHead
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.samples import AnswerSet
from megatron_interbert.tasks.answering.vocabulary import AnswerList
from megatron_interbert.tasks.config import FinetuneConfig
from megatron_interbert.tasks.gqa.config import GqaConfig
from megatron_interbert.tasks.gqa.job import gqa_job
from megatron_interbert.tasks.task import Job
from megatron_interbert.tasks.task_flags import config_of
from megatron_interbert.tasks.vgqa.config import VgqaConfig
from megatron_interbert.tasks.vgqa.job import vgqa_job
from megatron_interbert.tasks.vqa.config import VqaConfig
from megatron_interbert.tasks.vqa.job import vqa_job

FORMATS = {"vqa": (VqaConfig, vqa_job), "gqa": (GqaConfig, gqa_job), "vgqa": (VgqaConfig, vgqa_job)}
# flags that say which questions there are, and which answers
OF_FILES = {"questions", "annotations", "answers", "min_occurrences", "balanced"}
CHOOSING = ("balanced", "min_occurrences")  # those that are no files


@dataclass
class Asked:
    """Hold the questions of a run, the answers that its head can give, and a record of the files
    that determine them.
    """

    questions: Questions
    answers: AnswerList
    record: list[str] = field(default_factory=list)

    def head(self) -> TaskHead:
        """Return the head that answers them."""
        return TaskHead("answers", len(self.answers), every_batch=True)


def read_questions(config: RunConfig, state: ParallelState) -> Asked | None:
    """Read the questions of --questions, None without; raises UsageError for other flags than those
    that name files of vqa, gqa and vgqa.
    """
    if not config.questions:
        return None

    sets: list[AnswerSet] = []
    answers: list[AnswerList] = []
    record: list[str] = []
    for name, given in read_mapping(config.questions, "--questions").items():
        own, make_job = config_for(config, name, given)
        job = make_job(own, state)
        sets.append(job.samples)
        answers.append(AnswerList(job.data["task_heads"][name]["answers"]))
        settings = {flag: getattr(own, flag) for flag in CHOOSING if hasattr(own, flag)}
        record.append(json.dumps([name, job.data["manifest_sha256"], settings]))

    if not sets:
        raise UsageError(f"--questions {config.questions}: names no files")

    every = AnswerList(list(dict.fromkeys(answer for some in answers for answer in some.answers)))
    return Asked(joined(sets, answers, every), every, record)


def config_for(
    config: RunConfig, name: str, given: Any
) -> tuple[FinetuneConfig, Callable[..., Job]]:
    """Return the settings of one task of --questions, and what makes its finetuning job, whose
    samples are the questions.
    """
    if name not in FORMATS:
        raise UsageError(
            f"{config.questions}: no format '{name}'{nearest(name, FORMATS)}, expected some of"
            f" {', '.join(FORMATS)}"
        )

    kind, make_job = FORMATS[name]
    beside = (
        [flag for flag in given if key_of(flag) not in OF_FILES] if isinstance(given, dict) else []
    )
    if beside:
        raise UsageError(
            f"{config.questions}: {name}: '{beside[0]}' has no meaning in pretraining; expected"
            f" some of {', '.join(sorted(OF_FILES))}"
        )

    return config_of(config, config.questions, name, kind, given), make_job


def joined(sets: list[AnswerSet], answers: list[AnswerList], every: AnswerList) -> Questions:
    """Join the questions of several tasks, with the numbers of their answers in `every`."""
    texts: list[str] = []
    images, numbers, scores, lengths = [], [], [], []

    for some, known in zip(sets, answers, strict=True):
        new = np.array([every.numbers[answer] for answer in known.answers], np.int64)
        texts += [" ".join(record.texts) for record in some.samples.records.items]
        images.append(some.samples.images[:, 0])
        numbers.append(new[some.targets.numbers])
        scores.append(some.targets.scores)
        lengths.append(np.diff(some.targets.offsets))

    return Questions(
        texts,
        np.concatenate(images),
        np.concatenate(numbers),
        np.concatenate(scores),
        np.cumsum(np.concatenate([[0], *lengths])),
    )
