"""Define GQA: the finetuning job, and the file for the server."""

import json
from collections import Counter
from collections.abc import Sequence

from megatron_interbert.config.stores import split_paths
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.job import Answering, answer_job, open_run, open_valid
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.answering.vocabulary import (
    AnswerList,
    frequent_answers,
    read_answers,
)
from megatron_interbert.tasks.gqa.config import GqaConfig
from megatron_interbert.tasks.gqa.metrics import check_questions, gqa_metrics
from megatron_interbert.tasks.gqa.samples import read_questions
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.task import Job

GQA = Answering(
    "gqa", gqa_metrics, ("accuracy", "binary", "open"), soft=True, check=check_questions
)


def gqa_job(config: GqaConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on --questions; the accuracy on --valid-questions decides which
    checkpoint is best.
    """
    opened = open_run(config)
    questions = split_paths(config.questions)
    records = read_questions(questions, opened.corpus, config.balanced)
    valid = None

    if paths := split_paths(config.valid_questions):
        corpus = open_valid(config, opened.corpus)
        valid = (read_questions(paths, corpus, config.balanced), corpus)

    seen = [records, *([valid[0]] if valid else [])]
    answers = answers_of(config, seen)

    return answer_job(GQA, config, state, opened, answers, records, questions, valid)


def answers_of(config: GqaConfig, seen: Sequence[Records]) -> AnswerList:
    """Return the answers to choose from: those of --answers, else all of the questions."""
    if config.answers:
        return read_answers(config.answers, "--answers")

    counts = Counter(answer for some in seen for record in some.items for answer in record.answers)
    return frequent_answers(counts.items(), 1)


def submission(records: Sequence[Record], given: Sequence[str]) -> str:
    """Return the JSON of the test server: the answer to each question."""
    answers = [
        {"questionId": record.id, "prediction": answer}
        for record, answer in zip(records, given, strict=True)
    ]
    return json.dumps(answers)
