"""Define questions of Visual Genome: the finetuning job, accuracy, and the file of answers."""

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_interbert.config.stores import split_paths
from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.job import Answering, answer_job, open_run, open_valid
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.answering.vocabulary import (
    AnswerList,
    frequent_answers,
    read_answers,
)
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.task import Job
from megatron_interbert.tasks.vgqa.config import VgqaConfig
from megatron_interbert.tasks.vgqa.samples import read_questions


def vgqa_metrics(records: Sequence[Record], given: Sequence[str]) -> dict[str, float]:
    """Return the accuracy in percent: the share of answers that are equal when normalised."""
    right = [answer in record.answers for record, answer in zip(records, given, strict=True)]
    return {"accuracy": 100.0 * float(np.mean(right))}


VGQA = Answering("vgqa", vgqa_metrics, soft=True)


def vgqa_job(config: VgqaConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on --questions; the accuracy on --valid-questions, or on the
    images of --minval, decides which checkpoint is best.
    """
    opened = open_run(config)
    questions, valid_questions = split_paths(config.questions), split_paths(config.valid_questions)
    if config.minval and valid_questions:
        raise UsageError("--minval and --valid-questions exclude each other; give one")

    records = read_questions(questions, "train", config.minval, opened.corpus)
    answers = answers_of(config, records)
    kept = [row for row, record in enumerate(records.items) if answers.known(record.answers)]
    beyond = len(records) - len(kept)
    if not kept:
        raise UsageError(f"{records.files}: no answer is among those to choose from")
    if beyond and state.is_main:
        print(
            f"{records.files}: {beyond} questions left out: the head cannot give their answers",
            flush=True,
        )

    valid = None
    if config.minval or valid_questions:
        corpus = open_valid(config, opened.corpus)
        paths = valid_questions or questions
        valid = (read_questions(paths, "valid", config.minval, corpus), corpus)

    return answer_job(VGQA, config, state, opened, answers, records.take(kept), questions, valid)


def answers_of(config: VgqaConfig, records: Records) -> AnswerList:
    """Return the answers to choose from: those of --answers, else the frequent ones."""
    if config.answers:
        return read_answers(config.answers, "--answers")

    counts = Counter(answer for record in records.items for answer in record.answers)
    answers = frequent_answers(counts.items(), config.min_occurrences)
    if not len(answers):
        raise UsageError(
            f"no answer occurs {config.min_occurrences} times; lower --min-occurrences, or give"
            " --answers"
        )

    return answers


def predictions(records: Sequence[Record], given: Sequence[str]) -> str:
    """Return the JSON of the answer to each question."""
    answers = [
        {"qa_id": int(record.id), "answer": answer}
        for record, answer in zip(records, given, strict=True)
    ]
    return json.dumps(answers)
