"""Build the job that finetunes on a task which points at regions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.stores import split_paths
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.model.heads import TaskHead
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.config import refuse_idle_stores
from megatron_interbert.tasks.grounding.annotated import note_on_annotated
from megatron_interbert.tasks.grounding.config import EvaluateRegionsConfig, RegionConfig
from megatron_interbert.tasks.grounding.prediction import Ranked, rank_regions
from megatron_interbert.tasks.grounding.records import RegionRecord
from megatron_interbert.tasks.grounding.samples import RegionSamples, RegionSet
from megatron_interbert.tasks.grounding.task import RegionTask
from megatron_interbert.tasks.overlaps import image_names, leave_out
from megatron_interbert.tasks.parts import (
    describe_data,
    fitted_sizes,
    open_stores,
    vocabulary_of_run,
)
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.task import Evaluate, Job
from megatron_interbert.tasks.task_flags import own_settings
from megatron_interbert.tasks.two_stores import TwoStores

# Tells whether boxes [n, 4] are right for a sample, bool [n], under a convention of IoU.
IsRight = Callable[[RegionRecord, np.ndarray, str], np.ndarray]
# Computes figures in percent from whether the best regions of each sample are right, best first.
Metrics = Callable[[Sequence[np.ndarray]], dict[str, float]]
HEAD = TaskHead("regions")


@dataclass(frozen=True)
class Pointing:
    """Describe a task that points at regions.

    `is_right` judges a region, `metrics` computes the task's figures from the `most` best ones;
    `figures` are their names, the main one first. With `apart` annotated and detected boxes are
    evaluated one after another, each as if there were no others, and reported by `_gt` and `_det`.
    """

    name: str
    is_right: IsRight
    metrics: Metrics
    figures: tuple[str, ...] = ("accuracy",)
    most: int = 1
    apart: bool = True

    def ways(self, stores: TwoStores) -> dict[str, TwoStores]:
        """Return the stores to evaluate on, by what their figures' names end with."""
        return stores.apart() if self.apart else {"": stores}

    def figures_of(
        self, records: Records, ranked: Sequence[Ranked], convention: str
    ) -> dict[str, float]:
        """Return the figures of the best regions of records, of those whose right boxes are known;
        none if no one's are.
        """
        rights = [
            self.is_right(records.items[row], ranked[row].boxes[: self.most], convention)
            for row in records.known()
        ]
        return self.metrics(rights) if rights else {}

    def names(self, stores: TwoStores) -> tuple[str, ...]:
        """Return the names of all figures of an evaluation on some stores, the main one first."""
        return tuple(name + end for end in self.ways(stores) for name in self.figures)


@dataclass
class Opened:
    """Hold what finetuning on a task has opened: images, vocabulary, and the model's sizes."""

    stores: TwoStores
    tokenizer: CaptionTokenizer
    sizes: ModelConfig


def open_two(
    annotated: str, detected: str, config: RegionConfig | EvaluateRegionsConfig
) -> TwoStores:
    """Open the stores of annotated and detected regions; either path may be empty.

    Raises UsageError if both are, or if their features are not alike.
    """
    paths = [split_paths(path) for path in (annotated, detected)]
    stores = [open_stores(some, config) if some else None for some in paths]
    if all(stores):
        stores[0].check_alike(stores[1].stores[0], config.allow_other_detector, "--data-path")

    return TwoStores(*stores, config.max_regions)  # as it was fitted to the stores


def open_run(config: RegionConfig) -> Opened:
    """Open the stores and the vocabulary of a finetuning."""
    stores = open_two(config.annotated_path, config.data_path, config)
    paths = [*split_paths(config.data_path), *split_paths(config.annotated_path)]
    tokenizer = vocabulary_of_run(config, paths)

    return Opened(stores, tokenizer, fitted_sizes(config, tokenizer, stores.corpora[0]))


def open_valid(config: RegionConfig, trained: TwoStores) -> TwoStores:
    """Open the stores of the validation images, by default those of the training images."""
    if not (config.valid_data_path or config.valid_annotated_path):
        return trained

    annotated = config.valid_annotated_path or config.annotated_path
    detected = config.valid_data_path or config.data_path
    valid = open_two(annotated, detected, config)
    first = valid.corpora[0].stores[0]
    flag = "--valid-data-path" if valid.annotated is None else "--valid-annotated-path"
    trained.corpora[0].check_alike(first, config.allow_other_detector, flag)

    return valid


def region_job(
    task: Pointing,
    config: RegionConfig,
    state: ParallelState,
    opened: Opened,
    records: Records,
    files: Sequence[str],
    valid: tuple[Records, TwoStores] | None = None,
) -> Job:
    """Build the job that trains on `records`, which `files` determine, and evaluates on `valid`.

    Samples without a right box are dropped and counted; raises UsageError if none is left.
    """
    records = records.labelled("box")
    stores = opened.stores
    print_report(records, stores, state)

    def make_set(records: Records) -> RegionSet:
        samples = RegionSamples(task.name, records, stores, opened.tokenizer, config.max_tokens)
        return RegionSet(samples, records, config, config.iou)

    others = [str(s.path / MANIFEST) for corpus in stores.corpora[1:] for s in corpus.stores]
    data = describe_data(
        opened.tokenizer, stores.corpora[0], [*others, *files], task.name, records.content
    )
    data["task_heads"] = {task.name: {"settings": own_settings(config)}}
    figures = task.names(valid[1] if valid else stores)

    job = Job(
        RegionTask(task.name, config.loss),
        make_set(records),
        opened.sizes,
        (),
        data,
        opened.tokenizer.vocab_file,
        model_options={"task_heads": {task.name: HEAD}},
        metric=config.metric or figures[0],
        figures=figures,
        patience=config.early_stopping,
    )
    job.leave_out = partial(leave_out, job, make_set, records)
    if valid is None:
        refuse_idle_stores(config)
    else:
        judged = valid[0].labelled("box")
        print_report(judged, valid[1], state)
        job.judged_images = image_names(judged)
        ways = samples_by_way(task, judged, valid[1], opened.tokenizer, config.max_tokens)
        job.evaluate = evaluation_of(task, config, state, judged, ways)

    return job


def print_report(records: Records, stores: TwoStores, state: ParallelState) -> None:
    """Print the counts of samples read and dropped, and a note if the stores look swapped."""
    if not state.is_main:
        return

    print(records.report(), flush=True)
    if note := note_on_annotated(records, stores):
        print(note, flush=True)


def evaluation_of(
    task: Pointing,
    config: RegionConfig,
    state: ParallelState,
    judged: Records,
    ways: Mapping[str, RegionSamples],
) -> Evaluate:
    """Return a function that evaluates a model on records, which `ways` lay out."""

    def evaluate(model: InterBert, state: ParallelState, device: torch.device) -> dict[str, float]:
        found: dict[str, float] = {}
        for end, shown in ways.items():
            ranked = rank_regions(model, shown, state, device, config.eval_batch_size, task.most)
            some = task.figures_of(judged, ranked, config.iou)
            found |= {f"{name}{end}": some[name] for name in task.figures}
        return found

    return evaluate


def samples_by_way(
    task: Pointing,
    records: Records,
    stores: TwoStores,
    tokenizer: CaptionTokenizer,
    max_tokens: int,
) -> dict[str, RegionSamples]:
    """Return the samples of an evaluation for each way in which regions may be chosen."""
    return {
        end: RegionSamples(
            task.name,
            replace(records, images=some.columns_of(records.images, stores)),
            some,
            tokenizer,
            max_tokens,
        )
        for end, some in task.ways(stores).items()
    }


def stores_of(config: EvaluateRegionsConfig) -> list[str]:
    """List the region stores of an evaluation, the annotated ones first."""
    return [*split_paths(config.annotated_path), *split_paths(config.data_path)]
