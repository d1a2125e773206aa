"""Run `evaluate vcr`: the three accuracies, the test server's CSV, a page of questions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.files import write_text
from megatron_interbert.pages.photo_folder import photos_in
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.tasks.loading import (
    agree_on_inputs,
    as_trained,
    check_photos,
    load_model,
    open_for,
)
from megatron_interbert.tasks.parts import fit_length
from megatron_interbert.tasks.results import Published, result_of, table, write_result
from megatron_interbert.tasks.vcr.config import EvaluateVcrConfig
from megatron_interbert.tasks.vcr.job import (
    check_labels,
    open_images,
    predict,
    submission_lines,
    vcr_metrics,
)
from megatron_interbert.tasks.vcr.page import result_page
from megatron_interbert.tasks.vcr.samples import Question, VcrImages, VcrTexts, read_questions

PUBLISHED = (
    Published(
        "vcr",
        "InterBERT",
        {"q_a": 73.1, "qa_r": 74.8, "q_ar": 54.9},
        "README of the authors' code, black4321/InterBERT",
    ),
)


def evaluate_vcr(
    config: EvaluateVcrConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, for labelled questions result.html and, with --submission, submission.csv,
    and return the result.

    All ranks of a launch must call it.
    """
    check_photos(config.image_folder, state)
    model, source = load_model(
        config.load, ("choice",), config.kernels, device, state, config.averaged, config.precision
    )
    as_trained(config, source, "vcr")
    images = open_images(config.annotated_path, config.data_path, config)
    paths = [path for path in (config.annotated_path, config.data_path) if path]
    corpus, tokenizer = open_for(config, source, paths[:1])
    fit_length(config, source.config)
    fit_length(config, source.config, "max_rationale_tokens")
    files = [*(f"{path}/{MANIFEST}" for path in paths), config.annotations]
    folder = agree_on_inputs(config, state, source, tokenizer, files)
    questions = read_questions(config.annotations, images, whole=config.submission)
    if state.is_main:
        print(questions.report(), flush=True)

    items = questions.items
    if not config.submission:
        check_labels(questions)

    texts = VcrTexts(tokenizer, config.max_tokens, config.max_rationale_tokens)

    with progress(total=len(items), unit="question", desc="answering", shown=state.is_main) as bar:
        answers, rationales = predict(
            *(model, items, images, texts, state, device, config.batch_size),
            every_answer=config.submission,
            progress=lambda count: bar.update(count * state.data_size),
        )

    metrics: dict[str, float] = {}
    given_right = rationales
    if questions.labelled:
        if config.submission:
            given_right = rationales[np.arange(len(items)), [q.answer_label for q in items]]
        metrics = vcr_metrics(items, answers, given_right)

    counts = {"questions": len(items), "samples": len(items)}
    more = {**counts, "dropped": dict(questions.dropped)}
    result = result_of(config, "finetuned", metrics, source, corpus, files[1:], PUBLISHED, **more)
    if state.is_main:
        write_result(folder, result)
        print(table(result) if metrics else "the annotations have no labels: no metrics computed")
        print(f"result: {folder / 'result.json'}")
        if config.submission:
            write_submission(folder, items, answers, rationales)
        if questions.labelled:  # last, because photos may turn out to be unreadable
            write_page(config, folder, result, items, answers, given_right, images)

    return result


def write_page(
    config: EvaluateVcrConfig,
    folder: Path,
    result: dict[str, Any],
    items: Sequence[Question],
    answers: np.ndarray,
    rationales: np.ndarray,
    images: VcrImages,
) -> None:
    """Write result.html: metrics, and questions with their images, answers and rationales."""
    photos = photos_in(config.image_folder)
    page = result_page(result, items, answers, rationales, images, config.examples, photos)
    write_text(folder / "result.html", page)
    print(f"page:   {folder / 'result.html'}")


def write_submission(
    folder: Path, items: Sequence[Question], answers: np.ndarray, rationales: np.ndarray
) -> None:
    """Write submission.csv in the format of the leaderboard."""
    lines = submission_lines(items, answers, rationales)
    write_text(folder / "submission.csv", "\n".join(lines) + "\n")
    print(f"submission: {folder / 'submission.csv'}")
