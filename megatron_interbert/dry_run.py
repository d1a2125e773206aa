"""Rehearse a pretraining run of any size without its machines: shapes, memory, communication.

    interbert dry-run --world-size 512 --tensor-model-parallel-size 8 --model base --data-path STORE
    interbert dry-run --world-size 512 --ranks all --config run.yaml

It takes the flags of pretrain. Each rank is rehearsed in turn with this project's model and
DeepSpeed's engine, on tensors that have shapes and no content, with a process group whose other
ranks do not exist. Ranks that would call different collectives, and so hang, are found before a
GPU is paid for, and with --device a run that does not fit. Kernels are those that a run on GPUs
takes: `--kernels torch` rehearses plain torch operations, which keep more for the backward pass.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from megatron_interbert.command_line import parse
from megatron_interbert.config.options import AUTO, option
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.config.words import span
from megatron_interbert.data.order import MicroBatches, check_partitions
from megatron_interbert.data.packing import PackedBatch, pack, to_batch
from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.files import check_output, json_text, write_output
from megatron_interbert.machines.processes import aligned, quiet_libraries
from megatron_interbert.model.presets import check_words, with_usual_data
from megatron_interbert.parallel.agreement import some
from megatron_interbert.planning.layout import rank_parameters
from megatron_interbert.planning.memory import Memory, predict
from megatron_interbert.planning.timing import MACHINES
from megatron_interbert.planning.traffic import Traffic, step_traffic
from megatron_interbert.progress import progress
from megatron_interbert.tasks.parts import sizes_of_model
from megatron_interbert.tasks.pretraining.job import heads_of, model_options, pretraining_job
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.deepspeed_config import agree_with_json, described_offload, merge
from megatron_interbert.training.micro_batch import layout_of
from megatron_interbert.training.model_plan import plan_model
from megatron_interbert.virtual.comparison import find_hang, missing_or_double
from megatron_interbert.virtual.rank import (
    HERE,
    Rehearsal,
    VirtualState,
    one_of,
    rehearse,
    without_values,
)
from megatron_interbert.virtual.samples import random_examples
from megatron_interbert.virtual.stand_ins import triton_without_gpu
from megatron_interbert.virtual.tracking import Volumes

GIB = 2**30
SPARE = 0.05  # least share of a GPU's memory for its driver and fragments


@dataclass
class DryRunConfig(RunConfig):
    """Hold the flags of the run and those of the rehearsal."""

    world_size: int = option(1, "processes the run will have", least=1, group="dry run")
    ranks: str = option(
        "",
        "ranks to rehearse, comma-separated, or all; default: all of the first tensor-parallel"
        " group, and the last rank",
        group="dry run",
    )
    words: tuple[int, int] = option(
        (),
        "take random samples instead of --data-path, of this many tokens with [CLS] and [SEP],"
        " from-to",
        read=span,
        group="dry run",
    )
    regions: tuple[int, int] = option(
        (36, 36), "regions of a random sample, from-to; default: 36", read=span, group="dry run"
    )
    processes: int = option(
        0, "ranks rehearsed at a time; default: one per core", least=0, group="dry run"
    )
    device: str = option(
        "", "GPU of the run by name; the run must fit its memory", ("", *MACHINES), group="dry run"
    )
    gpu_memory: float = option(
        0.0, "GiB of each GPU; default: that of --device", least=0, group="dry run"
    )
    output: str = option("", "JSON file for the figures", group="dry run")

    usual_disk: ClassVar[str] = "a disk of each machine"

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()
        self.check_ranks(self.world_size)
        if self.micro_batch_size == AUTO:
            raise UsageError("--micro-batch-size auto is found by trial on a device; give a number")

        self.chosen_ranks()

    @property
    def memory_of_gpu(self) -> float:
        """Return the bytes of a GPU of the run; 0 if they are not known."""
        named = MACHINES[self.device].memory_gib if self.device else 0.0
        return (self.gpu_memory or named) * GIB

    def chosen_ranks(self) -> list[int]:
        """Return the ranks to rehearse; UsageError if one does not exist."""
        if self.ranks == "all":
            return list(range(self.world_size))
        if not self.ranks:
            return sorted({*range(self.tensor_model_parallel_size), self.world_size - 1})

        words = [word.strip() for word in self.ranks.split(",") if word.strip()]
        wrong = [w for w in words if not w.isdecimal() or int(w) >= self.world_size]
        if wrong or not words:
            raise UsageError(
                f"--ranks {self.ranks}: expected all, or numbers from 0 to {self.world_size - 1}"
            )

        return sorted({int(word) for word in words})


def settle(config: DryRunConfig) -> None:
    """Settle batch sizes and ZeRO stage as the run would."""
    agree_with_json(config)
    config.data_parallel_size = config.world_size // config.tensor_model_parallel_size
    config.fit_zero_stage(config.world_size)
    merge(config, config.data_parallel_size)
    settle_kernels(config)
    if config.words:
        sizes, note = with_usual_data(sizes_of_model(config))
        check_words(sizes, config.words[1])
        config.notes += [note] if note else []
        # random samples are as many as needed
        config.fit_partitions(max(config.data_partitions, config.global_batch_size))


def settle_kernels(config: DryRunConfig) -> None:
    """Choose Triton's kernels, as a run on GPUs does, or plain operations where they cannot be
    rehearsed; UsageError if Triton's are asked for there.
    """
    hindrance = ""
    if not find_spec("triton"):
        hindrance = "triton is not installed"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        hindrance = "TRITON_INTERPRET is set"

    if hindrance and config.kernels == "triton":
        raise UsageError(f"--kernels triton: {hindrance}; use --kernels torch")
    if hindrance and config.kernels == "auto":
        config.kernels = "torch"
        config.notes.append(f"note: {hindrance}: plain torch operations are rehearsed")
    elif config.kernels == "auto":
        config.kernels = "triton"


def rehearse_rank(task: tuple[DryRunConfig, int]) -> Rehearsal | str:
    """Rehearse one rank in this process; return what it did, or why it cannot run."""
    config, rank = task
    torch.set_num_threads(1)

    try:
        with one_of(config.world_size, rank), triton_without_gpu(config.kernels):
            state = VirtualState(
                config.tensor_model_parallel_size,
                config.sequence_parallel,
                expert_parallel_size=config.expert_parallel_size,
            )
            job = random_job(config) if config.words else pretraining_job(config, state)
            check_partitions(
                config.told("data_partitions"), config.data_partitions, state.data_size
            )
            config.check_routing_groups()
            plan = plan_model(config, job, state, HERE)
            return rehearse(config, job, plan, state, micro_batches(config, job, state))
    except UsageError as error:
        return str(error)


def random_job(config: DryRunConfig) -> Job:
    """Return a job whose samples are random."""
    sizes, _ = with_usual_data(sizes_of_model(config))
    heads = heads_of(config, has_labels=True)
    for name in {"attributes", "vqa"}.intersection(config.objective_names()):
        raise UsageError(f"--words: random samples have nothing for {name}; leave --words out")
    options = model_options(config)
    return Job(PretrainingTask(config), None, sizes, heads, {}, "", model_options=options)


def micro_batches(config: DryRunConfig, job: Job, state: VirtualState) -> list[PackedBatch]:
    """Read, or make at random, the micro-batches of a rank's first step."""
    if config.words:
        sizes = job.model_config
        lengths = (config.micro_batch_size, config.words, config.regions)
        steps = config.accumulation_steps(state.data_size)
        seeds = range(state.data_rank * steps, (state.data_rank + 1) * steps)
        return [pack(random_examples(sizes, *lengths, seed), sizes.feature_dim) for seed in seeds]

    stream = MicroBatches(
        0, config.global_batch_size, config.micro_batch_size, state.data_rank, state.data_size
    )
    positions = iter(stream)
    steps = config.accumulation_steps(state.data_size)
    order = job.samples.order

    return [to_batch(job.samples.fields(order.pairs(next(positions), 0))) for _ in range(steps)]


def rehearse_all(config: DryRunConfig) -> list[Rehearsal]:
    """Rehearse the chosen ranks in several processes; UsageError if one cannot run."""
    ranks = config.chosen_ranks()
    import_module("torch._dynamo")  # what all ranks need, before they are forked
    with without_values():
        torch.zeros(1) + 1
    context = multiprocessing.get_context("fork")
    at_once = min(config.processes or len(os.sched_getaffinity(0)), len(ranks))
    found = []

    with ProcessPoolExecutor(at_once, context) as pool:
        results = pool.map(rehearse_rank, [(config, rank) for rank in ranks])
        try:
            for result in progress(results, total=len(ranks), desc="ranks", unit="rank"):
                if isinstance(result, str):
                    pool.shutdown(cancel_futures=True)
                    raise UsageError(f"rank {ranks[len(found)]}: {result}")
                found.append(result)
        except BrokenProcessPool as error:
            raise UsageError(
                "a process that rehearsed a rank was killed (memory ran out?); give a smaller"
                " --processes"
            ) from error

    return found


def planned_memory(config: DryRunConfig, rehearsal: Rehearsal) -> Memory:
    """Predict the memory of a rank by arithmetic."""
    layout = layout_of(config, config.data_parallel_size, rehearsal.kernels)
    return predict(rehearsal.sizes, layout, rehearsal.load)


def planned_traffic(config: DryRunConfig, rehearsal: Rehearsal) -> Traffic:
    """Predict the bytes that a rank contributes to its collectives by arithmetic."""
    layout = layout_of(config, config.data_parallel_size, rehearsal.kernels)
    return step_traffic(rehearsal.sizes, layout, rehearsal.tokens)


def announce(config: DryRunConfig) -> str:
    """Return a line on what is about to be rehearsed."""
    tensor = config.tensor_model_parallel_size
    precision = "fp16" if config.fp16 else "bf16" if config.bf16 else "fp32"
    offload = described_offload(merge(config, config.data_parallel_size))
    shared = ""
    if config.sequence_parallel:
        shared = " with sequence parallelism" if tensor > 1 else " (--sequence-parallel: no effect)"
    experts = config.expert_parallel_size
    divided = f", EP{experts}" if experts > 1 else ""
    recomputed = ", activations recomputed" if config.recompute_activations else ""

    return (
        f"rehearsing {len(config.chosen_ranks())} of {config.world_size} ranks:"
        f" DP{config.data_parallel_size} x TP{tensor}{shared}{divided},"
        f" ZeRO-{config.zero_stage}{offload}, {precision}, {config.kernels} kernels{recomputed};"
        f" micro-batch {config.micro_batch_size}, global batch {config.global_batch_size}"
    )


def describe(config: DryRunConfig, rehearsals: list[Rehearsal]) -> list[str]:
    """Return the lines of the report."""
    first = rehearsals[0]
    largest = max(rehearsals, key=lambda one: one.peak)
    planned = planned_memory(config, largest)
    ranks = (config.tensor_model_parallel_size, config.expert_parallel_size)
    each = rank_parameters(first.sizes, *ranks)
    host = ""
    if planned.host:
        host = f", of which the host has {planned.host / GIB:.2f} by plan"

    return [
        f"parameters: {each / 1e6:.1f} M on a rank, before ZeRO",
        (
            f"memory of a rank: {largest.states / GIB:.2f} GiB between steps, peak"
            f" {largest.peak / GIB:.2f} (planned {planned.together / GIB:.2f}), rank"
            f" {largest.rank}{host}"
        ),
        f"collectives of a step of rank {first.rank}, with the bytes that it contributes:",
        *table(Volumes.of(first.collectives), planned_traffic(config, first)),
    ]


def table(volumes: Volumes, planned: Traffic) -> list[str]:
    """Return the lines of a table of collectives."""
    rows = [("operation", "group", "calls", "MB", "planned")]
    for (operation, group), calls in sorted(volumes.calls.items()):
        sizes = (volumes.bytes[operation, group], planned[operation, group])
        rows.append((operation, group, calls, *(f"{size / 1e6:.3f}" for size in sizes)))

    return aligned(rows)


def check_together(config: DryRunConfig, rehearsals: list[Rehearsal]) -> list[str]:
    """Return lines on what was compared; UsageError if ranks disagree or lose parameters."""
    names = [one.rank for one in rehearsals]
    if problem := find_hang(rehearsals):
        raise UsageError(f"the run would hang: {problem}")

    lines = [f"collectives: all complete, played with ranks {some(names)}"]
    if len(names) < config.world_size:
        return [*lines, "checkpoint: what all ranks save is checked with --ranks all"]

    outlines = {(one.tensor_rank, one.data_rank): one.outline for one in rehearsals}
    if problem := missing_or_double(outlines, rehearsals[0].shapes):
        raise UsageError(f"a checkpoint would be wrong: {problem}")

    return [*lines, "checkpoint: each element of weights and moments is saved once"]


def check_fit(config: DryRunConfig, rehearsals: list[Rehearsal]) -> str:
    """Return a line on the memory of the run's GPUs; UsageError if a rank needs more.

    Tracked memory is that of device and host together: the host's part by plan is subtracted. On a
    CPU offloaded parameters of one rank are not gathered, so the device's part by plan counts if it
    is the larger.
    """
    there = config.memory_of_gpu
    largest = max(rehearsals, key=lambda one: one.peak)
    planned = planned_memory(config, largest)
    needed = largest.peak - planned.host
    source = " (tracked peak less the host's part)" if planned.host else ""
    if planned.host and planned.peak > needed:
        needed = planned.peak
        source = " (by plan, as the host's part cannot be tracked apart)"
    said = f"{needed / GIB:.2f} of {there / GIB:g} GiB of the GPU{source}, rank {largest.rank}"
    if needed > there:
        less = "lower --micro-batch-size"
        if largest.states - planned.host > there:
            less = "share or offload more (--zero-stage, --tensor-model-parallel-size)"
        raise UsageError(f"the run would not fit: {said}; {less}, or see interbert plan")

    tight = needed > (1 - SPARE) * there
    spare = f"; less than {SPARE:.0%} is left for its driver and allocator" if tight else ""

    return f"fits: {said}{spare}"


def record(config: DryRunConfig, rehearsals: list[Rehearsal]) -> dict[str, Any]:
    """Return the figures as a JSON object; memory and volumes in bytes."""
    volumes = Volumes.of(rehearsals[0].collectives)
    planned = planned_traffic(config, rehearsals[0])

    return {
        "world_size": config.world_size,
        "ranks": [
            {
                "rank": one.rank,
                "states": one.states,
                "peak": one.peak,
                "planned": planned_memory(config, one).together,
            }
            for one in rehearsals
        ],
        "collectives": [
            {
                "operation": operation,
                "group": group,
                "calls": calls,
                "bytes": volumes.bytes[operation, group],
                "planned": planned[operation, group],
            }
            for (operation, group), calls in sorted(volumes.calls.items())
        ],
    }


def dry_run(config: DryRunConfig) -> None:
    """Rehearse and report."""
    if config.output:
        check_output(Path(config.output), "--output")

    deepspeed.accelerator.set_accelerator(CPU_Accelerator())
    quiet_libraries()
    settle(config)
    print(*config.notes, announce(config), sep="\n", flush=True)
    rehearsals = rehearse_all(config)
    print(*describe(config, rehearsals), sep="\n", flush=True)
    print(*check_together(config, rehearsals), sep="\n", flush=True)
    if config.output:
        write_output(Path(config.output), json_text(record(config, rehearsals)), "--output")
    if config.memory_of_gpu:
        print(check_fit(config, rehearsals), flush=True)


def run() -> None:
    """Parse the flags and run."""
    about = str(__doc__)
    config = parse(DryRunConfig, about)
    config.check()
    dry_run(config)


def main() -> None:
    """Run the entry point: one-line errors, exit code 2 for wrong use."""
    run_entry(run)


if __name__ == "__main__":
    main()
