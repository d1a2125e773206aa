"""Evaluate a task that points at regions: figures, a page, a file of the chosen boxes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.files import write_text
from megatron_interbert.pages.photo_folder import photos_in
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.tasks.grounding.config import EvaluateRegionsConfig
from megatron_interbert.tasks.grounding.job import (
    HEAD,
    Pointing,
    open_two,
    samples_by_way,
    stores_of,
)
from megatron_interbert.tasks.grounding.page import result_page
from megatron_interbert.tasks.grounding.prediction import Ranked, rank_regions
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
from megatron_interbert.tasks.two_stores import TwoStores

LEAST_SHOWN = 3  # best regions of a sample on the page

# Reads the official files of an evaluation: images -> samples.
Read = Callable[[TwoStores], Records]


def evaluate_regions(
    task: Pointing,
    config: EvaluateRegionsConfig,
    state: ParallelState,
    device: torch.device,
    files: Sequence[str],
    read: Read,
    published: Sequence[Published] = (),
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the chosen boxes, and return the
    result.

    `files` determine the samples that `read` returns. All ranks of a launch must call it.
    """
    check_photos(config.image_folder, state)
    model, source = load_model(
        config.load,
        (),
        config.kernels,
        device,
        state,
        config.averaged,
        config.precision,
        task_heads={task.name: HEAD},
        options_of=lambda source: kept_head(task.name, source) and {},
    )
    as_trained(config, source, task.name)
    stores = open_two(config.annotated_path, config.data_path, config, config.max_regions)
    corpus, tokenizer = open_for(config, source, stores_of(config)[:1])
    fit_length(config, source.config)
    manifests = [s.path / MANIFEST for other in stores.corpora for s in other.stores]
    folder = agree_on_inputs(config, state, source, tokenizer, [*manifests, *files])
    records = read(stores)
    if state.is_main:
        print(records.report(), flush=True)

    ways = samples_by_way(task, records, stores, tokenizer, config.max_tokens)
    metrics: dict[str, float] = {}
    ranked: dict[str, list[Ranked]] = {}
    total = len(records) * len(ways)

    with progress(total=total, unit="sample", desc="pointing", shown=state.is_main) as bar:
        for end, samples in ways.items():
            ranked[end] = rank_regions(
                *(model, samples, state, device, config.batch_size, max(task.most, LEAST_SHOWN)),
                progress=lambda count: bar.update(count * state.data_size),
            )
            if records.labelled:
                found = task.metrics(records.items, ranked[end], config.iou)
                metrics |= {f"{name}{end}": value for name, value in found.items()}

    more = {
        "samples": len(records),
        "dropped": dict(records.drops.counts),
        "iou_convention": config.iou,
    }
    data = [*map(str, manifests[1:]), *files]
    result = result_of(config, "finetuned", metrics, source, corpus, data, published, **more)
    if state.is_main:
        write_result(folder, result)
        print(table(result) if metrics else "the files have no boxes: no metrics computed")
        print(f"result: {folder / 'result.json'}")
        if config.submission:
            write_chosen(folder, records, ranked)
        if config.examples:  # last, because photos may turn out to be unreadable
            photos = photos_in(config.image_folder)
            best = next(iter(ranked.values()))
            page = result_page(result, records, best, stores, config.examples, config.iou, photos)
            write_text(folder / "result.html", page)
            print(f"page:   {folder / 'result.html'}")

    return result


def write_chosen(folder: Path, records: Records, ranked: dict[str, list[Ranked]]) -> None:
    """Write the best box of each sample, in pixels x1 y1 x2 y2, as JSON lines."""
    lines = []
    for row, record in enumerate(records.items):
        boxes = {
            f"box{end}": [round(float(v), 2) for v in of_way[row].boxes[0]]
            for end, of_way in ranked.items()
        }
        lines.append(json.dumps({"id": record.id, **boxes}) + "\n")

    write_text(folder / "predictions.jsonl", "".join(lines))
    print(f"predictions: {folder / 'predictions.jsonl'}")
