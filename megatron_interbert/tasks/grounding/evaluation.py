"""Evaluate a task that points at regions: figures, a page, a file of the chosen boxes."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.pages.photo_folder import photos_in
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.tasks.grounding.config import EvaluateRegionsConfig
from megatron_interbert.tasks.grounding.job import (
    HEAD,
    Pointing,
    open_two,
    print_report,
    samples_by_way,
    stores_of,
)
from megatron_interbert.tasks.grounding.page import SHOWN_BOXES, result_page
from megatron_interbert.tasks.grounding.prediction import Ranked, rank_regions
from megatron_interbert.tasks.grounding.samples import RegionSamples
from megatron_interbert.tasks.kept_heads import load_with_head
from megatron_interbert.tasks.loading import (
    agree_on_inputs,
    as_trained,
    check_photos,
    open_for,
)
from megatron_interbert.tasks.parts import fit_length
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.results import Output, Published, result_of, write_outputs
from megatron_interbert.tasks.two_stores import TwoStores

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
    model, source = load_with_head(task.name, lambda kept: HEAD, config, state, device)
    as_trained(config, source, task.name)
    stores = open_two(config.annotated_path, config.data_path, config)
    corpus, tokenizer = open_for(config, source, stores_of(config)[:1])
    fit_length(config, source.config)
    manifests = [s.path / MANIFEST for other in stores.corpora for s in other.stores]
    folder = agree_on_inputs(config, state, source, tokenizer, [*manifests, *files])
    records = read(stores)
    print_report(records, stores, state)

    ways = samples_by_way(task, records, stores, tokenizer, config.max_tokens)
    ranked = rank_all(model, ways, task, config, state, device)
    metrics = {
        f"{name}{end}": value
        for end, best in ranked.items()
        for name, value in task.figures_of(records, best, config.iou).items()
    }
    more = {
        "samples": len(records),
        "dropped": dict(records.drops.counts),
        "iou_convention": config.iou,
        **({"content_sha256": records.content} if records.content else {}),
    }
    data = [*files, *map(str, manifests[1:])]
    result = result_of(config, "finetuned", metrics, source, corpus, data, published, **more)
    if not state.is_main:
        return result

    def page() -> str:
        way = next(iter(ranked))
        photos = photos_in(config.image_folder)
        return result_page(result, task, records, way, ranked[way], stores, config, photos)

    def chosen() -> str:
        return chosen_lines(records, ranked)

    outputs = [
        Output("predictions.jsonl", chosen, "predictions", config.submission),
        # last, because photos may turn out to be unreadable
        Output("result.html", page, "page", config.examples > 0),
    ]
    write_outputs(folder, result, records.unlabelled("box"), outputs)

    return result


def rank_all(
    model: InterBert,
    ways: dict[str, RegionSamples],
    task: Pointing,
    config: EvaluateRegionsConfig,
    state: ParallelState,
    device: torch.device,
) -> dict[str, list[Ranked]]:
    """Rank the regions of all samples in each way, and show the progress."""
    total = sum(map(len, ways.values()))
    most = max(task.most, SHOWN_BOXES)

    with progress(total=total, unit="sample", desc="pointing", shown=state.is_main) as bar:
        return {
            end: rank_regions(
                model,
                samples,
                state,
                device,
                config.batch_size,
                most,
                progress=lambda count: bar.update(count * state.data_size),
            )
            for end, samples in ways.items()
        }


def chosen_lines(records: Records, ranked: dict[str, list[Ranked]]) -> str:
    """Return the best box of each sample, in pixels x1 y1 x2 y2, as JSON lines."""
    lines = []
    for row, record in enumerate(records.items):
        boxes = {
            f"box{end}": [round(float(v), 2) for v in of_way[row].boxes[0]]
            for end, of_way in ranked.items()
        }
        lines.append(json.dumps({"id": record.id, **boxes}) + "\n")

    return "".join(lines)
