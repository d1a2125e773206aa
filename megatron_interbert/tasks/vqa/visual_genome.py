"""Finetune and evaluate on the questions of Visual Genome, which each have one answer."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from megatron_interbert.config.options import FREE, ONE_TEXT, SAME, option, redefault, setting
from megatron_interbert.config.stores import split_paths
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.reading import read_json_value
from megatron_interbert.tasks.answering.config import (
    AnswerConfig,
    EvaluateAnswersConfig,
    evaluated_tokens,
    files,
    tokens,
)
from megatron_interbert.tasks.answering.evaluation import evaluate_answers
from megatron_interbert.tasks.answering.job import Answering, answer_job, open_run, open_valid
from megatron_interbert.tasks.answering.records import Record, place_in
from megatron_interbert.tasks.answering.vocabulary import (
    AnswerList,
    frequent_answers,
    read_answers,
)
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.records import check_entry
from megatron_interbert.tasks.task import Job
from megatron_interbert.tasks.vqa.answers import normalise_answer

KEYS = {"qa_id": int, "image_id": (int, str), "question": str, "answer": str}
HELD_OUT = "the last N images by id"


@dataclass
class VgqaConfig(AnswerConfig):
    """Finetune on the questions of Visual Genome, for its own sake or before others."""

    questions: str = files("question_answers.json of Visual Genome, several comma-separated")
    valid_questions: str = files("questions to evaluate on; default: no evaluation")
    minval: int = setting(
        0, f"train without {HELD_OUT}, and evaluate on those (VOLTA: 5000)", SAME, least=0
    )
    answers: str = setting(
        "",
        "JSON of the answers to choose from, such as VQA's; default: the frequent ones",
        FREE,
    )
    min_occurrences: int = setting(
        9, "without --answers: keep answers given to at least this many questions", SAME, least=1
    )
    global_batch_size: int = redefault(AnswerConfig, "global_batch_size", 128)
    lr: float = redefault(AnswerConfig, "lr", 4e-5)
    max_tokens: int = tokens(26, "tokens per question, [CLS] and [SEP] included", ONE_TEXT)


@dataclass
class EvaluateVgqaConfig(EvaluateAnswersConfig):
    """Evaluate questions of Visual Genome: the share answered as the file does."""

    TASK: ClassVar[str] = "vgqa"

    questions: str = option("", "question_answers.json of Visual Genome, several comma-separated")
    minval: int = option(0, f"only {HELD_OUT}; 0: all", least=0)
    max_tokens: int = evaluated_tokens(26, "tokens per question", ONE_TEXT)


def vgqa_metrics(records: Sequence[Record], given: Sequence[str]) -> dict[str, float]:
    """Return the accuracy in percent: the share of answers that are equal when normalised."""
    right = [answer in record.answers for record, answer in zip(records, given, strict=True)]
    return {"accuracy": 100.0 * float(np.mean(right))}


VGQA = Answering("vgqa", vgqa_metrics, soft=True)


def read_questions(
    paths: Sequence[str], part: str, minval: int, corpus: Corpus, whole: bool = False
) -> Records:
    """Read questions with their normalised answers: all, or (`part` train or valid) those of all
    but the last `minval` images by id, or of these.
    """
    if not paths:
        raise UsageError("--questions is missing; give question_answers.json of Visual Genome")

    images = sorted(
        (entry for path in paths for entry in images_of(path)), key=lambda image: int(image["id"])
    )
    if not images:
        raise UsageError(f"--questions {', '.join(paths)}: holds no images with questions")
    if minval >= len(images):
        raise UsageError(
            f"--minval {minval}: there are {len(images)} images; give a smaller number"
        )
    if minval:
        images = images[:-minval] if part == "train" else images[-minval:]

    records = [record_of(entry) for image in images for entry in image["qas"]]

    return place_in(corpus, ", ".join(paths), records, whole)


def images_of(path: str) -> Iterator[dict[str, Any]]:
    """Yield the images of a file, each with its questions."""
    document = read_json_value(path, "--questions")
    if not isinstance(document, list):
        raise UsageError(f"--questions {path}: expected a list of images; give a file of VG's QA")

    for number, image in enumerate(document):
        where = f"{path}: image {number}"
        check_entry(image, {"id": int, "qas": list}, where)
        for place, entry in enumerate(image["qas"]):
            check_entry(entry, KEYS, f"{where}, question {place}")
        yield image


def record_of(entry: dict[str, Any]) -> Record | Rejected:
    """Return a question as a record, or (id, reason) if it cannot be used."""
    number = str(entry["qa_id"])
    answer = normalise_answer(entry["answer"])
    if not entry["question"].strip():
        return number, "the question has no text"
    if not answer:
        return number, "it has no answer"

    return Record(number, (entry["question"],), (str(entry["image_id"]),), {answer: 1.0})


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
        print(f"{records.files}: {beyond} questions left out: the head cannot give their answers")

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


def evaluate_vgqa(
    config: EvaluateVgqaConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the answers; return the result.

    All ranks of a launch must call it.
    """
    questions = split_paths(config.questions)

    return evaluate_answers(
        VGQA,
        config,
        state,
        device,
        questions,
        lambda config, corpus: read_questions(
            questions, "valid", config.minval, corpus, config.submission
        ),
        ("predictions.json", predictions),
    )


def predictions(records: Sequence[Record], given: Sequence[str]) -> str:
    """Return the JSON of the answer to each question."""
    answers = [
        {"qa_id": int(record.id), "answer": answer}
        for record, answer in zip(records, given, strict=True)
    ]
    return json.dumps(answers)
