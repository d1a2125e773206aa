"""Define VQA: the finetuning job and the official accuracy."""

import json
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from megatron_interbert.config.stores import split_paths
from megatron_interbert.data.corpus import Corpus
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
from megatron_interbert.tasks.vqa.answers import official_accuracy
from megatron_interbert.tasks.vqa.config import VqaConfig
from megatron_interbert.tasks.vqa.samples import (
    Answered,
    main_answers,
    read_annotations,
    read_questions,
)


def vqa_metrics(records: Sequence[Record], given: Sequence[str]) -> dict[str, float]:
    """Return the official accuracy in percent: overall, by type of answer, and by type of question
    where the files name the types.
    """
    values = [
        100.0 * official_accuracy(answer, record.facts.said)
        for record, answer in zip(records, given, strict=True)
    ]
    by_type: dict[str, list[float]] = defaultdict(list)
    for kind in ("answer_type", "question_type"):
        for record, value in zip(records, values, strict=True):
            if name := getattr(record.facts, kind):
                by_type[f"{kind}: {name}"].append(value)

    means = {name: float(np.mean(some)) for name, some in sorted(by_type.items())}

    return {"accuracy": float(np.mean(values)), **means}


VQA = Answering("vqa", vqa_metrics, soft=True)


def vqa_job(config: VqaConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on --questions and --annotations.

    The official accuracy on --valid-questions decides which checkpoint is best.
    """
    opened = open_run(config)
    questions, annotations = split_paths(config.questions), split_paths(config.annotations)
    if not annotations:
        raise UsageError("--annotations is missing; give v2_.._annotations.json of VQA")

    valid_files = split_paths(config.valid_questions), split_paths(config.valid_annotations)
    answered, valid_answered = read_annotations(annotations), read_annotations(valid_files[1])
    records = read_questions(questions, answered, opened.corpus)
    answers = answers_of(config, [some for some in (answered, valid_answered) if some])
    valid = None

    if config.minval and not valid_files[0]:
        raise UsageError("--minval needs --valid-questions, whose last questions are evaluated on")

    if valid_files[0]:
        if not valid_files[1]:
            raise UsageError(
                "--valid-annotations is missing, with the answers to --valid-questions"
            )
        valid_corpus = open_valid(config, opened.corpus)
        judged = read_questions(valid_files[0], valid_answered, valid_corpus)
        if config.minval:
            records, judged = with_minval(config, opened.corpus, records, judged)
        valid = (judged, valid_corpus)

    files = [*questions, *annotations]
    if config.minval:
        files += [path for paths in valid_files for path in paths]

    return answer_job(VQA, config, state, opened, answers, records, files, valid)


def answers_of(config: VqaConfig, answered: Sequence[Answered]) -> AnswerList:
    """Return the answers to choose from: those of --answers, else the frequent ones."""
    if config.answers:
        return read_answers(config.answers, "--answers")

    answers = frequent_answers(main_answers(answered).items(), config.min_occurrences)
    if not len(answers):
        raise UsageError(
            f"no answer is the main one of {config.min_occurrences} questions; lower"
            " --min-occurrences, or give --answers"
        )

    return answers


def with_minval(
    config: VqaConfig, corpus: Corpus, records: Records, judged: Records
) -> tuple[Records, Records]:
    """Move the validation questions to the training ones, except the last --minval by id."""
    if config.valid_data_path:
        raise UsageError(
            "--minval trains on images of --valid-questions too; give all stores as --data-path and"
            " leave --valid-data-path out"
        )

    if config.minval >= len(judged):
        raise UsageError(
            f"--minval {config.minval}: --valid-questions has {len(judged)}; give a smaller number"
        )

    by_id = sorted(range(len(judged)), key=lambda row: int(judged.items[row].id))
    kept = judged.take(by_id[-config.minval :])

    return Records.join([records, judged.take(by_id[: -config.minval])]), kept


def submission(records: Sequence[Record], given: Sequence[str]) -> str:
    """Return the JSON of the test server: the answer to each question."""
    answers = [
        {"question_id": int(record.id), "answer": answer}
        for record, answer in zip(records, given, strict=True)
    ]
    return json.dumps(answers)
