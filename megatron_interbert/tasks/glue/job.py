"""Define the GLUE task (interaction layers, text stream and a classifier, as in BERT), its
finetuning job and the official metrics.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_interbert.data.packing import PackedBatch, to_batch
from megatron_interbert.data.sending import send_batch
from megatron_interbert.errors import UsageError
from megatron_interbert.model.interbert import InterBert, InterBertOutput
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.classification import ClassificationTask
from megatron_interbert.tasks.glue.config import GlueConfig
from megatron_interbert.tasks.glue.samples import (
    FORMATS,
    GlueRows,
    GlueSet,
    find_file,
    read_rows,
)
from megatron_interbert.tasks.pairs import NOTHING, pair_fields
from megatron_interbert.tasks.parts import describe_data, fitted_sizes, vocabulary_of_run
from megatron_interbert.tasks.task import Job
from megatron_interbert.tasks.texts import FramedTexts

METRICS = {
    "CoLA": ("matthews",),
    "STS-B": ("pearson", "spearman"),
    "MRPC": ("accuracy", "f1"),
    "QQP": ("accuracy", "f1"),
}


class GlueTask(ClassificationTask):
    """Compute the cross entropy over the classes, or the squared error of a regression score."""

    KINDS = ("sentence",)

    def answers(
        self, output: InterBertOutput, batch: PackedBatch
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(output.sentence_logits, batch.labels)]

    def count_targets(self, batch: PackedBatch) -> torch.Tensor:
        return torch.tensor([len(batch.labels)], dtype=torch.float64)

    @staticmethod
    def summed(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if labels.is_floating_point():
            return (logits[:, 0] - labels).square().sum(), logits.new_zeros(())
        return ClassificationTask.summed(logits, labels)


def glue_job(config: GlueConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on a task's train.tsv.

    Unless --metric is given, the first official metric on dev.tsv decides which checkpoint is best.
    """
    path = find_file(config.data_path, config.task, "train")
    dev = find_file(config.data_path, config.task, FORMATS[config.task].dev[0])
    tokenizer = vocabulary_of_run(config)
    sizes = fitted_sizes(config, tokenizer, None)
    rows = read_rows(path, config.task, training=True)
    valid = read_rows(dev, config.task)

    if state.is_main:
        print(
            f"{path}: {len(rows.texts)} rows, {rows.dropped} dropped (too few fields or no text)",
            flush=True,
        )

    texts = FramedTexts(valid.texts, tokenizer, config.max_tokens)

    def evaluate(model: InterBert, state: ParallelState, device: torch.device) -> dict[str, float]:
        return glue_metrics(
            config.task, predict(model, texts, state, device, config.eval_batch_size), valid.labels
        )

    return Job(
        GlueTask(),
        GlueSet(rows, tokenizer, config, sizes.feature_dim),
        sizes,
        ("sentence",),
        describe_data(tokenizer, None, [path], f"glue {config.task}"),
        tokenizer.vocab_file,
        model_options={"num_labels": labels_of(config.task), "text_only": True},
        evaluate=evaluate,
        metric=config.metric or metric_names(config.task)[0],
        figures=metric_names(config.task),
        patience=config.early_stopping,
    )


def labels_of(task: str) -> int:
    """Return the number of outputs of the classifier: one per class, or 1 for regression."""
    return len(FORMATS[task].classes) or 1


@torch.no_grad()
def predict(
    model: InterBert,
    texts: FramedTexts,
    state: ParallelState,
    device: torch.device,
    batch_size: int,
) -> np.ndarray:
    """Return the logits of all rows in file order, float32 [n, labels].

    Each rank computes a share; all return the same.
    """
    mine = np.argsort(texts.lengths(), kind="stable")[state.data_rank :: state.data_size]
    parts = []
    for start in range(0, len(mine), batch_size):
        fields = pair_fields(texts.inputs(mine[start : start + batch_size]), None, NOTHING, 1)
        parts.append(model(send_batch(to_batch(fields), device)).sentence_logits)

    # a rank has no rows if there are more ranks than rows
    logits = torch.cat(parts).cpu().numpy() if parts else None

    found = [(rows, values) for rows, values in state.gather((mine, logits)) if values is not None]
    rows = np.concatenate([rows for rows, _ in found])
    values = np.concatenate([values for _, values in found])

    return values[np.unique(rows, return_index=True)[1]]


def metric_names(task: str) -> tuple[str, ...]:
    """Return the names of the official metrics of a task."""
    return METRICS.get(task, ("accuracy",))


def glue_metrics(task: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute the official metrics in percent (correlations times 100).

    `logits` are [n, labels], `labels` [n]. Raises UsageError if there are no labels.
    """
    if not len(labels):
        raise UsageError(
            f"{task}: the file has no labels, so there is nothing to compare with; give a labelled"
            " file"
        )
    if not FORMATS[task].classes:
        scores = logits[:, 0].astype(np.float64)
        values = {
            "pearson": correlation(scores, labels),
            "spearman": correlation(mean_ranks(scores), mean_ranks(labels)),
        }
    else:
        found = logits.argmax(axis=1)
        hits = float((found * labels).sum()) if len(FORMATS[task].classes) == 2 else 0.0
        values = {
            "accuracy": float((found == labels).mean()),
            "f1": 2 * hits / max(float(found.sum() + labels.sum()), 1.0),  # of class 1
            "matthews": correlation(found, labels),  # for two classes it equals Pearson's
        }

    return {name: 100.0 * values[name] for name in metric_names(task)}


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's correlation; 0 if one side is constant."""
    a, b = (np.asarray(x, np.float64) - np.mean(x, dtype=np.float64) for x in (first, second))
    spread = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / spread) if spread else 0.0


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, float64 [n]; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def prediction_lines(task: str, rows: GlueRows, logits: np.ndarray) -> list[str]:
    """Return the lines of a submission file: a header, then each row's index and its class name,
    or its score cut to 0 to 5.
    """
    classes: Sequence[str] = FORMATS[task].classes
    answers = (
        [classes[i] for i in logits.argmax(axis=1)]
        if classes
        else [f"{min(max(v, 0.0), 5.0):.3f}" for v in logits[:, 0]]
    )

    return [
        "index\tprediction",
        *(f"{index}\t{answer}" for index, answer in zip(rows.index, answers, strict=True)),
    ]
