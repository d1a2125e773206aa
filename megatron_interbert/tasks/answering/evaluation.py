"""Evaluate a task that chooses one of fixed answers: figures, a page, a file for the server."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError
from megatron_interbert.model.heads import TaskHead
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.pages.photo_folder import photos_in
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.tasks.answering.config import EvaluateAnswersConfig
from megatron_interbert.tasks.answering.job import Answering
from megatron_interbert.tasks.answering.page import result_page
from megatron_interbert.tasks.answering.prediction import Predictions, predict
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.answering.samples import AnswerSamples
from megatron_interbert.tasks.answering.vocabulary import AnswerList
from megatron_interbert.tasks.kept_heads import kept_head, load_with_head
from megatron_interbert.tasks.loading import (
    agree_on_inputs,
    as_trained,
    check_photos,
    open_for,
)
from megatron_interbert.tasks.parts import fit_length
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.results import Output, Published, result_of, write_outputs

SHOWN_ANSWERS = 5

# Reads the official files of an evaluation: images -> samples.
Read = Callable[[Corpus], Records]
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

    model, source = load_with_head(task.name, head_of, config, state, device)
    kept = kept_head(task.name, source)
    answers = AnswerList(kept["answers"])
    task = replace(task, side_by_side=kept.get("side_by_side", False))
    as_trained(config, source, task.name)
    corpus, tokenizer = open_for(config, source, config.stores())
    fit_length(config, source.config)
    manifests = [store.path / MANIFEST for store in corpus.stores]
    folder = agree_on_inputs(config, state, source, tokenizer, [*manifests, *files])
    records = read(corpus)
    task.check(records)
    if state.is_main:
        print(records.report(), flush=True)

    samples = task.lay_out(records, corpus, tokenizer, config)
    predictions = answer_all(model, samples, task, config, state, device, len(answers))
    given = [answers[number] for number in predictions.numbers[:, 0]]
    metrics = task.figures_of(records, given)
    more = {"samples": len(records), "dropped": dict(records.drops.counts)}
    result = result_of(config, "finetuned", metrics, source, corpus, files, published, **more)
    if not state.is_main:
        return result

    def page() -> str:
        photos = photos_in(config.image_folder)
        most = config.examples
        return result_page(result, records, predictions, answers, corpus, most, photos, task.soft)

    name, make = submission
    outputs = [
        Output(name, lambda: make(records.items, given), "submission", config.submission),
        # last, because photos may turn out to be unreadable
        Output("result.html", page, "page", config.examples > 0),
    ]
    write_outputs(folder, result, records.unlabelled("answer"), outputs)

    return result


def head_of(kept: Mapping[str, Any]) -> TaskHead:
    """Return a head as a checkpoint has kept it."""
    return TaskHead("answers", len(kept["answers"]), kept["rows"])


def answer_all(
    model: InterBert,
    samples: AnswerSamples,
    task: Answering,
    config: EvaluateAnswersConfig,
    state: ParallelState,
    device: torch.device,
    answers: int,
) -> Predictions:
    """Predict the best of `answers` answers to all samples, and show the progress."""
    total = len(samples)
    most = min(SHOWN_ANSWERS, answers)

    with progress(total=total, unit="sample", desc="answering", shown=state.is_main) as bar:
        return predict(
            model,
            samples,
            task.soft,
            state,
            device,
            config.batch_size,
            most,
            progress=lambda count: bar.update(count * state.data_size),
        )
