"""Evaluate a task that chooses one of fixed answers: figures, a page, a file for the server."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_text
from megatron_interbert.model.heads import TaskHead
from megatron_interbert.pages.photo_folder import photos_in
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.tasks.answering.config import EvaluateAnswersConfig
from megatron_interbert.tasks.answering.job import Answering
from megatron_interbert.tasks.answering.page import result_page
from megatron_interbert.tasks.answering.prediction import Predictions, predict
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.answering.vocabulary import AnswerList
from megatron_interbert.tasks.kept_heads import kept_head
from megatron_interbert.tasks.loading import (
    agree_on_inputs,
    as_trained,
    check_photos,
    load_model,
    open_for,
)
from megatron_interbert.tasks.parts import fit_length
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.results import Published, result_of, table, write_result
from megatron_interbert.weights.sources import WeightSource

SHOWN_ANSWERS = 5

# Reads the official files of an evaluation: (config, images) -> samples.
Read = Callable[[Any, Corpus], Records]
# Makes the text of a submission: (records, answers given) -> text.
Submission = Callable[[Sequence[Record], Sequence[str]], str]


def evaluate_answers(
    task: Answering,
    config: EvaluateAnswersConfig,
    state: ParallelState,
    device: torch.device,
    files: Sequence[str],
    read: Read,
    submission: tuple[str, Submission],
    published: Sequence[Published] = (),
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the file for the benchmark's server,
    and return the result.

    `files` determine the samples that `read` returns; `submission` is a file's name and what makes
    its text. All ranks of a launch must call it.
    """
    check_photos(config.image_folder, state)
    if not config.stores():
        raise UsageError("--data-path is missing; give the region store of the images")

    model, source = load_model(
        config.load,
        (),
        config.kernels,
        device,
        state,
        config.averaged,
        config.precision,
        options_of=lambda source: {"task_heads": {task.name: head_of(task, source)}},
    )
    kept = kept_head(task.name, source)
    answers = AnswerList(kept["answers"])
    task = replace(task, side_by_side=kept["rows"] < task.images)
    as_trained(config, source, task.name)
    corpus, tokenizer = open_for(config, source, config.stores())
    fit_length(config, source.config)
    folder = agree_on_inputs(
        config,
        state,
        source,
        tokenizer,
        [*(store.path / MANIFEST for store in corpus.stores), *files],
    )
    records = read(config, corpus)
    if state.is_main:
        print(records.report(), flush=True)

    samples = task.samples(
        *(task.name, records, corpus, tokenizer, config.max_tokens, config.max_regions),
        task.side_by_side,
    )
    with progress(total=len(records), unit="sample", desc="answering", shown=state.is_main) as bar:
        predictions = predict(
            *(model, samples, task.soft, state, device, config.batch_size),
            min(SHOWN_ANSWERS, len(answers)),
            progress=lambda count: bar.update(count * state.data_size),
        )

    metrics = task.figures_of(records, predictions, answers) if records.labelled else {}
    more = {"samples": len(records), "dropped": dict(records.drops.counts)}
    result = result_of(config, "finetuned", metrics, source, corpus, files, published, **more)
    if state.is_main:
        write_result(folder, result)
        print(table(result) if metrics else "the files have no answers: no metrics computed")
        print(f"result: {folder / 'result.json'}")
        if config.submission:
            write_submission(folder, records, predictions, answers, submission)
        if config.examples:  # last, because photos may turn out to be unreadable
            photos = photos_in(config.image_folder)
            page = result_page(
                result, records, predictions, answers, corpus, config.examples, photos
            )
            write_text(folder / "result.html", page)
            print(f"page:   {folder / 'result.html'}")

    return result


def head_of(task: Answering, source: WeightSource) -> TaskHead:
    """Return the head of a task as a checkpoint has it; raises UsageError if it has none."""
    record = kept_head(task.name, source)
    return TaskHead("answers", len(record["answers"]), record["rows"])


def write_submission(
    folder: Path,
    records: Records,
    predictions: Predictions,
    answers: AnswerList,
    submission: tuple[str, Submission],
) -> None:
    """Write the file for the benchmark's server."""
    name, make = submission
    given = [answers[number] for number in predictions.numbers[:, 0]]
    write_text(folder / name, make(records.items, given))
    print(f"submission: {folder / name}")
