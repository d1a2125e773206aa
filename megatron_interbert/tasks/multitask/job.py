"""Build the job that finetunes on several tasks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_interbert.config.weights import read_weights
from megatron_interbert.data.corpus import check_detector
from megatron_interbert.data.order import SampleOrder
from megatron_interbert.errors import UsageError
from megatron_interbert.files import json_sha256
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.config import FinetuneConfig
from megatron_interbert.tasks.multitask.config import MultitaskConfig, configs_of
from megatron_interbert.tasks.multitask.image_lists import listed_images
from megatron_interbert.tasks.multitask.same_images import SameImages
from megatron_interbert.tasks.multitask.samples import MultitaskSet
from megatron_interbert.tasks.multitask.schedule import Schedule, sampling_weights
from megatron_interbert.tasks.multitask.task import MultiTask
from megatron_interbert.tasks.task import Job
from megatron_interbert.tasks.task_flags import own_settings

MakeJob = Callable[[Any, ParallelState], Job]
MEAN = "mean"  # figure: the mean of the tasks' main figures


def multitask_job(
    config: MultitaskConfig,
    state: ParallelState,
    known: Mapping[str, tuple[type[FinetuneConfig], MakeJob]],
) -> Job:
    """Build the job that trains on the tasks of --task-flags, which are among those `known`.

    Raises UsageError if the tasks cannot share a model.
    """
    configs = configs_of(config, {name: kind for name, (kind, _) in known.items()})
    jobs = {
        name: job_of(f"{config.task_flags}: {name}", known[name][1], own, state)
        for name, own in configs.items()
    }
    config.notes += [f"{name}: {note}" for name, own in configs.items() for note in own.notes]
    check_alike(config, jobs)
    lost = leave_out_images(config, jobs, state)
    share_partitions(config, jobs)

    sizes = [job.samples.order.epoch_length for job in jobs.values()]
    weights = sampling_weights(sizes, config.schedule, config.temperature)
    schedule = Schedule(list(jobs), config.seed, weights, config.stop_and_go)
    first = next(iter(jobs.values()))
    figures = figures_of(jobs)

    job = Job(
        MultiTask({name: job.task for name, job in jobs.items()}, loss_weights(config, jobs)),
        MultitaskSet({name: job.samples for name, job in jobs.items()}, schedule, config),
        first.model_config,
        tuple(dict.fromkeys(head for job in jobs.values() for head in job.heads)),
        joined_data(jobs, configs, lost),
        first.vocabulary,
        model_options={"task_heads": joined_heads(jobs)},
        metric=config.metric or MEAN,
        figures=figures,
        patience=config.early_stopping,
        valid_configs=tuple(configs.values()),
    )
    judged = {name: job for name, job in jobs.items() if job.evaluate is not None}
    if config.stop_and_go and len(judged) < len(jobs):
        raise UsageError("--stop-and-go: every task needs validation files, by which it is judged")
    if not judged:
        job.metric = ""
        return job

    job.evaluate = evaluation_of(judged)
    job.note_evaluation = lambda step, values: schedule.note(
        step, {name: values[f"{name}_{job.metric}"] for name, job in judged.items()}
    )

    return job


def job_of(where: str, make_job: MakeJob, config: FinetuneConfig, state: ParallelState) -> Job:
    """Build the job of one task; its errors say in which task of the file they are."""
    try:
        return make_job(config, state)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def evaluation_of(judged: Mapping[str, Job]) -> Callable[..., dict[str, float]]:
    """Return what evaluates a model on the validation files of each task."""

    def evaluate(model: InterBert, state: ParallelState, device: torch.device) -> dict[str, float]:
        found: dict[str, float] = {}
        main = []

        for name, job in judged.items():
            values = job.evaluate(model, state, device)
            main.append(values[job.metric])
            found |= {f"{name}_{figure}": value for figure, value in values.items()}

        return {MEAN: sum(main) / len(main), **found}

    return evaluate


def figures_of(jobs: Mapping[str, Job]) -> tuple[str, ...]:
    """Return the names of all figures, the mean of the main ones first."""
    return (MEAN, *(f"{name}_{figure}" for name, job in jobs.items() for figure in job.figures))


def check_alike(config: MultitaskConfig, jobs: Mapping[str, Job]) -> None:
    """Raise UsageError unless all tasks have the same model sizes, features and vocabulary, and
    read images.
    """
    first_name, first = next(iter(jobs.items()))
    known_name, detector = known_detector(jobs)

    for name, job in jobs.items():
        where = f"{config.task_flags}: {name}"
        if job.model_options.get("text_only"):
            raise UsageError(f"{where}: a task without images cannot share a model with others")
        if job.leave_out is None:
            raise UsageError(
                f"{where}: images that other tasks are evaluated on cannot be taken out of its"
                " samples; train it alone"
            )
        for what, one, other in (
            ("model sizes", first.model_config, job.model_config),
            ("vocabulary", first.data["vocabulary"], job.data["vocabulary"]),
        ):
            if one != other:
                raise UsageError(
                    f"{where} and {first_name} have different {what}; use stores of one detector"
                    " and one vocabulary"
                )

        check_detector(
            detector,
            job.data["detector"],
            f"{where}, unlike {known_name}",
            config.allow_other_detector,
        )


def known_detector(jobs: Mapping[str, Job]) -> tuple[str, dict[str, Any] | None]:
    """Return the first task whose detector is known, and that detector; ("", None) if none is."""
    known = ((name, job.data["detector"]) for name, job in jobs.items() if job.data["detector"])
    return next(known, ("", None))


def leave_out_images(
    config: MultitaskConfig, jobs: Mapping[str, Job], state: ParallelState
) -> dict[str, list[str]]:
    """Take the images of every task's validation files, and those of --exclude-images, out of all
    training samples; return the ids of the samples that each task has lost, and print how many
    these are.
    """
    names = {name for job in jobs.values() for name in job.judged_images}
    names |= listed_images(config.exclude_images)
    if config.image_data:
        names |= SameImages(config.image_data).others(names)
    if not names:
        return {name: [] for name in jobs}

    lost = {name: job.leave_out(names) for name, job in jobs.items()}
    if state.is_main:
        counts = ", ".join(f"{name} {len(ids)}" for name, ids in lost.items())
        print(
            f"training samples left out, because a task is evaluated on their images: {counts}",
            flush=True,
        )

    return lost


def share_partitions(config: MultitaskConfig, jobs: Mapping[str, Job]) -> None:
    """Cut the samples of all tasks into the same number of partitions: the most that fit the
    smallest.
    """
    orders: dict[str, SampleOrder] = {name: job.samples.order for name, job in jobs.items()}
    smallest = min(sum(map(len, order.parts)) for order in orders.values())
    partitions = config.fit_partitions(smallest)

    for name, order in orders.items():
        jobs[name].samples.order = type(order)(
            order.parts, partitions, order.seed, lengths=order.lengths
        )


def loss_weights(config: MultitaskConfig, jobs: Mapping[str, Job]) -> dict[str, float]:
    """Read --loss-weights; raises UsageError for an unknown task or no positive number."""

    def check(name: str, flag: str) -> None:
        if name not in jobs:
            raise UsageError(f"{flag}: no task '{name}', expected some of {', '.join(jobs)}")

    return read_weights(config.loss_weights, "--loss-weights", check)


def joined_heads(jobs: Mapping[str, Job]) -> dict[str, Any]:
    """Return the heads of all tasks by name."""
    return {
        name: head
        for job in jobs.values()
        for name, head in job.model_options.get("task_heads", {}).items()
    }


def joined_data(
    jobs: Mapping[str, Job],
    configs: Mapping[str, FinetuneConfig],
    lost: Mapping[str, list[str]],
) -> dict[str, Any]:
    """Return the record of the data of all tasks that a checkpoint keeps."""
    first = next(iter(jobs.values()))
    content = [
        [name, job.data["manifest_sha256"], own_settings(configs[name]), lost[name]]
        for name, job in jobs.items()
    ]

    return {
        "store": "; ".join(str(job.data["store"]) for job in jobs.values()),
        "manifest_sha256": json_sha256(content),
        "detector": known_detector(jobs)[1],
        "vocabulary": first.data["vocabulary"],
        "task": f"multitask {','.join(jobs)}",
        "task_heads": {
            name: head
            for job in jobs.values()
            for name, head in job.data.get("task_heads", {}).items()
        },
        "left_out": {name: len(ids) for name, ids in lost.items()},
    }
