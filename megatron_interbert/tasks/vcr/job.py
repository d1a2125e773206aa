"""Define VCR, in which the choice head scores each option: joint finetuning on answers and
rationales, predictions, metrics and the submission file.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.data.packing import PackedBatch, to_batch
from megatron_interbert.data.sending import send_batch
from megatron_interbert.errors import UsageError, local_errors
from megatron_interbert.model.interbert import InterBert, InterBertOutput
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.classification import ClassificationTask
from megatron_interbert.tasks.overlaps import rows_without
from megatron_interbert.tasks.pairs import pair_fields
from megatron_interbert.tasks.parts import (
    describe_data,
    fit_length,
    fitted_sizes,
    open_stores,
    vocabulary_of_run,
)
from megatron_interbert.tasks.task import Job
from megatron_interbert.tasks.vcr.config import EvaluateVcrConfig, VcrConfig
from megatron_interbert.tasks.vcr.samples import (
    OPTIONS,
    Question,
    Questions,
    VcrImages,
    VcrSet,
    VcrTexts,
    read_questions,
)

Inputs = list[tuple[np.ndarray, np.ndarray]]


class VcrTask(ClassificationTask):
    """Compute the softmax cross entropy over the four options of each part."""

    KINDS = ("answer", "rationale")

    def answers(
        self, output: InterBertOutput, batch: PackedBatch
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        logits = output.choice_logit.view(-1, 2, OPTIONS)
        labels = batch.labels.view(-1, 2)
        return [(logits[:, part], labels[:, part]) for part in (0, 1)]

    def count_targets(self, batch: PackedBatch) -> torch.Tensor:
        return torch.full((2,), len(batch.labels) // 2, dtype=torch.float64)


def open_images(annotated: str, detected: str, config: VcrConfig | EvaluateVcrConfig) -> VcrImages:
    """Open the stores of annotated and detected regions; either path may be empty.

    Raises UsageError if both are, or if their features are not alike.
    """
    stores = [open_stores([path], config) if path else None for path in (annotated, detected)]
    if all(stores):
        stores[0].check_alike(stores[1].stores[0], config.allow_other_detector, "--data-path")
    return VcrImages(*stores, config.max_regions)


def vcr_job(config: VcrConfig, state: ParallelState) -> Job:
    """Build the job that finetunes jointly on the answers and rationales of --annotations.

    Unless --metric is given, Q->AR on --valid-annotations decides which checkpoint is best.
    """
    images = open_images(config.annotated_path, config.data_path, config)
    tokenizer = vocabulary_of_run(
        config, [path for path in (config.data_path, config.annotated_path) if path]
    )
    corpus = images.detected or images.annotated
    sizes = fitted_sizes(config, tokenizer, corpus)
    fit_length(config, sizes, "max_rationale_tokens")
    questions = read_questions(config.annotations, images)
    texts = VcrTexts(tokenizer, config.max_tokens, config.max_rationale_tokens)
    if state.is_main:
        print(questions.report(), flush=True)

    other = [f"{path}/{MANIFEST}" for path in (config.data_path, config.annotated_path) if path][1:]
    data = describe_data(tokenizer, corpus, [*other, config.annotations], "vcr")
    samples = VcrSet(questions, images, texts, config)
    job = Job(
        VcrTask(),
        samples,
        sizes,
        ("choice",),
        data,
        tokenizer.vocab_file,
        metric=config.metric or "q_ar",
        figures=("q_a", "qa_r", "q_ar"),
        patience=config.early_stopping,
    )

    job.leave_out = partial(leave_out, job, questions)
    if config.valid_annotations:
        valid_images = open_valid_images(config, images)
        valid = read_questions(config.valid_annotations, valid_images)
        check_labels(valid)
        if state.is_main:
            print(valid.report(), flush=True)

        def evaluate(
            model: InterBert, state: ParallelState, device: torch.device
        ) -> dict[str, float]:
            answers, rationales = predict(
                model, valid.items, valid_images, texts, state, device, config.eval_batch_size
            )
            return vcr_metrics(valid.items, answers, rationales)

        job.judged_images = frozenset(map(valid_images.id_of, valid.items))
        job.evaluate = evaluate

    return job


def leave_out(job: Job, questions: Questions, names: Collection[str]) -> list[str]:
    """Take the questions about images with some names out of a job's training samples; return their
    ids.
    """
    samples: VcrSet = job.samples
    images = [(samples.images.id_of(question),) for question in questions.items]
    kept = rows_without(names, images, questions.path)
    lost = sorted(set(range(len(images))).difference(kept))
    if lost:
        some = replace(questions, items=[questions.items[row] for row in kept])
        job.samples = VcrSet(some, samples.images, samples.texts, samples.config)

    return [questions.items[row].annot_id for row in lost]


def open_valid_images(config: VcrConfig, images: VcrImages) -> VcrImages:
    """Open the stores of the validation images, by default those of the training images."""
    if not (config.valid_data_path or config.valid_annotated_path):
        return images
    annotated = config.valid_annotated_path or config.annotated_path
    detected = config.valid_data_path or config.data_path
    valid = open_images(annotated, detected, config)
    trained = images.detected or images.annotated
    first = (valid.detected or valid.annotated).stores[0]
    trained.check_alike(first, config.allow_other_detector, "--valid-data-path")
    return valid


@torch.no_grad()
def predict(
    model: InterBert,
    questions: Sequence[Question],
    images: VcrImages,
    texts: VcrTexts,
    state: ParallelState,
    device: torch.device,
    batch_size: int,
    every_answer: bool = False,
    progress: Callable[[int], None] = lambda questions: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of the answers [n, 4], and those of the rationales given the right answer
    [n, 4] or, with `every_answer`, given each answer [n, 4, 4].

    Each rank computes a share; all return the same.
    """
    mine = np.arange(len(questions))[state.data_rank :: state.data_size]
    given = OPTIONS if every_answer else 1
    parts = [torch.zeros(0, 1 + given, OPTIONS, device=device)]

    for start in range(0, len(mine), batch_size):
        some = [questions[i] for i in mine[start : start + batch_size]]
        rows: Inputs = []

        for q in some:
            rows += texts.answers(q)
            for answer in range(OPTIONS) if every_answer else [q.answer_label]:
                rows += texts.rationales(q, answer)

        image_of = np.repeat(np.arange(len(some)), (1 + given) * OPTIONS)
        with local_errors():
            regions = images.read(some)

        batch = send_batch(
            to_batch(pair_fields(rows, regions, image_of, images.feature_dim)), device
        )
        parts.append(model(batch).choice_logit.view(len(some), 1 + given, OPTIONS))
        progress(len(some))

    found = torch.cat(parts).cpu().numpy()  # the only wait for the device
    logits = np.empty((len(questions), 1 + given, OPTIONS), np.float32)
    for rows_of, values in state.gather((mine, found)):
        logits[rows_of] = values

    return logits[:, 0], logits[:, 1:] if every_answer else logits[:, 1]


def check_labels(questions: Questions) -> None:
    """Raise UsageError unless all questions have labels."""
    if not questions.labelled:
        raise UsageError(
            f"{questions.path}: not all questions have labels, which metrics need; give val.jsonl,"
            " or only predict (evaluate vcr --submission)"
        )


def vcr_metrics(
    questions: Sequence[Question], answers: np.ndarray, rationales: np.ndarray
) -> dict[str, float]:
    """Return the accuracies q_a, qa_r (given the right answer) and q_ar (both right), in percent.

    Chance is 25, 25 and 6.25.
    """
    right_answer = answers.argmax(axis=1) == np.array([q.answer_label for q in questions])
    right_rationale = rationales.argmax(axis=1) == np.array([q.rationale_label for q in questions])
    found = {"q_a": right_answer, "qa_r": right_rationale, "q_ar": right_answer & right_rationale}

    return {name: 100.0 * float(values.mean()) for name, values in found.items()}


def submission_lines(
    questions: Sequence[Question], answers: np.ndarray, rationales: np.ndarray
) -> list[str]:
    """Return the lines of the test server's CSV: probabilities of the answers, and of the
    rationales given each answer.

    `answers` and `rationales` are logits, [n, 4] and [n, 4, 4].
    """
    header = ["annot_id", *(f"answer_{i}" for i in range(OPTIONS))]
    header += [f"rationale_conditioned_on_a{a}_{r}" for a in range(OPTIONS) for r in range(OPTIONS)]
    probabilities = np.concatenate(
        [softmax(answers)[:, None], softmax(rationales)], axis=1
    ).reshape(len(questions), -1)
    rows = (
        ",".join([q.annot_id, *(f"{p:.6f}" for p in row)])
        for q, row in zip(questions, probabilities, strict=True)
    )

    return [",".join(header), *rows]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis, in float64."""
    return torch.from_numpy(logits).double().softmax(dim=-1).numpy()
