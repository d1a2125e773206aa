"""Run `evaluate glue`: official metrics on the dev files, prediction files for the test files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_text
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.glue.config import EvaluateGlueConfig
from megatron_interbert.tasks.glue.job import glue_metrics, labels_of, predict, prediction_lines
from megatron_interbert.tasks.glue.samples import FORMATS, GlueRows, find_file, read_rows
from megatron_interbert.tasks.loading import agree_on_inputs, as_trained, load_model, open_for
from megatron_interbert.tasks.parts import fit_length
from megatron_interbert.tasks.results import result_of, table, write_result
from megatron_interbert.tasks.texts import FramedTexts
from megatron_interbert.weights.sources import WeightSource


def evaluate_glue(
    config: EvaluateGlueConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json and, for each file, TASK.tsv (MNLI-m.tsv and MNLI-mm.tsv for MNLI), and
    return the result.

    All ranks of a launch must call it.
    """
    model, source = load_model(
        config.load,
        ("sentence",),
        config.kernels,
        device,
        state,
        config.averaged,
        config.precision,
        num_labels=labels_of(config.task),
        text_only=True,
    )
    check_task(config, source)
    _, tokenizer = open_for(config, source, [])
    as_trained(config, source, "glue")
    fit_length(config, source.config)

    format = FORMATS[config.task]
    names = format.submission or (config.task,)
    splits = format.test if config.split == "test" else format.dev
    files = [find_file(config.data_path, config.task, split) for split in splits]
    folder = agree_on_inputs(config, state, source, tokenizer, files)
    metrics = {}
    dropped = {}

    for file, name in zip(files, names, strict=True):
        rows = read_rows(file, config.task)
        dropped[name] = rows.dropped
        texts = FramedTexts(rows.texts, tokenizer, config.max_tokens)
        logits = predict(model, texts, state, device, config.batch_size)
        if len(rows.labels):
            found = glue_metrics(config.task, logits, rows.labels)
            prefix = f"{name}_" if len(names) > 1 else ""
            metrics |= {f"{prefix}{key}": value for key, value in found.items()}
        if state.is_main:
            write_predictions(config.task, rows, logits, file, folder / f"{name}.tsv")

    result = result_of(
        config, f"{config.task} {config.split}", metrics, source, None, files, dropped=dropped
    )
    if state.is_main:
        write_result(folder, result)
        print(table(result) if metrics else "the test files have no labels: no metrics computed")
        print(f"result: {folder / 'result.json'}")

    return result


def check_task(config: EvaluateGlueConfig, source: WeightSource) -> None:
    """Raise UsageError if the weights were finetuned on another task."""
    trained = str(source.facts.get("task") or "").removeprefix("glue ")
    if trained and trained != config.task:
        raise UsageError(
            f"--load {config.load}: finetuned on {trained}; give --task {trained}, or weights"
            f" finetuned on {config.task}"
        )


def write_predictions(
    task: str, rows: GlueRows, logits: np.ndarray, file: Path, target: Path
) -> None:
    """Write the predictions for one file of a task in the format of the GLUE server.

    `logits` are [rows, labels].
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, "\n".join(prediction_lines(task, rows, logits)) + "\n")
    print(f"{file}: {len(rows.texts)} rows -> {target}; {rows.dropped} dropped (too few fields)")
