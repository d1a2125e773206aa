"""Compare the step time that planning/timing.py predicts for layouts with what this machine takes.

The machine is described by three measurements, on other sizes than those that are predicted: passes
of a model of half the layers on all ranks at once, collectives of two lengths, an addition. As the
speed of a shared host changes from minute to minute, it is described before and after each layout,
and the prediction is made for the mean of the two.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.options import option
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.packing import PackedBatch, pack
from megatron_interbert.errors import UsageError
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.machines.processes import aligned
from megatron_interbert.model.flops import Tokens, training_flops
from megatron_interbert.model.interbert import PRETRAINING_HEADS
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.planning.layout import Layout
from megatron_interbert.planning.timing import (
    Machine,
    StepTime,
    hops,
    other_bytes,
    ring_seconds,
    step_time,
)
from megatron_interbert.progress import progress
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.micro_batch import layout_of
from megatron_interbert.training.model_plan import ModelPlan, build_engine
from megatron_interbert.virtual.samples import random_examples
from tools.benchmarks.batches import sizes_of
from tools.benchmarks.options import BenchmarkOptions
from tools.benchmarks.ranks import run_ranks

LENGTHS = (1 << 12, 1 << 23)  # elements of the collectives
ADDED = 20_000_000  # elements of two tensors that are added, to measure memory
ADDED_BYTES = 12  # read and written for each


@dataclass
class Options(BenchmarkOptions):
    """Measure how far predicted step times of layouts are from measured ones."""

    model: str = option("base", "preset or JSON file of sizes", group="model")
    ranks: int = option(2, "processes", least=2)
    batch: int = option(16, "samples of a rank's micro-batch", least=1)
    steps: int = option(5, "measured steps of each layout", least=1)


def measure(options: Options) -> dict[str, Any]:
    """Run all ranks, and print the table of their first one."""
    sizes = sizes_of(options.model)
    result = run_ranks(serve, options.ranks, options, sizes)
    print(*table(result), sep="\n")

    return result


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the report."""
    parts = [entry.name for entry in dataclasses.fields(StepTime)]
    rows = [("layout", "predicted s", "measured s", "ratio", *parts)]
    for name, one in result["layouts"].items():
        cells = [f"{one['parts'][part]:.3f}" for part in parts]
        ratio = f"{one['predicted'] / one['measured']:.2f}"
        rows.append((name, f"{one['predicted']:.3f}", f"{one['measured']:.3f}", ratio, *cells))

    machine = result["machine"]
    return [
        (
            f"a rank: {machine['tflops'] * 1000:.1f} GFLOP/s, {machine['link_gb_s']:.2f} GB/s and"
            f" {machine['latency'] * 1e6:.0f} us to the others (all-gather"
            f" {machine['all_gather_slower']:.1f} times a ring's seconds, reduce-scatter"
            f" {machine['reduce_scatter_slower']:.1f}), {machine['memory_gb_s']:.2f} GB/s of memory"
        ),
        *aligned(rows),
    ]


def serve(rank: int, options: Options, sizes: ModelConfig) -> dict[str, Any]:
    """Be one rank: describe the machine, then train in one layout after another."""
    machines = [describe_machine(options, sizes)]
    layouts = {}
    bar = progress(configurations(options, sizes), desc="layouts", unit="layout", shown=rank == 0)
    for config in bar:
        layout, tokens, measured = in_layout(config, options, sizes)
        gc.collect()

        machines.append(describe_machine(options, sizes))
        predicted = step_time(sizes, layout, [tokens], mean_machine(machines[-2:]))
        layouts[name_of(config, options)] = {
            "predicted": predicted.total,
            "measured": measured,
            "parts": dataclasses.asdict(predicted),
        }

    return {"machine": dataclasses.asdict(mean_machine(machines)), "layouts": layouts}


def configurations(options: Options, sizes: ModelConfig) -> list[RunConfig]:
    """Return the layouts to compare, all in fp32."""
    found = []
    for tensor in (1, 2, 4):
        try:
            sizes.check_tensor_parallel(tensor)
        except UsageError:
            continue
        if options.ranks % tensor:
            continue

        for stage in (0, 1, 2, 3) if options.ranks > tensor else (0,):
            for split in (False, True) if tensor > 1 and stage < 2 else (False,):
                config = RunConfig(micro_batch_size=options.batch, zero_stage=stage)
                config.tensor_model_parallel_size = tensor
                config.sequence_parallel = split
                found.append(config)

    return found


def name_of(config: RunConfig, options: Options) -> str:
    """Return how a layout is called in the table."""
    tensor = config.tensor_model_parallel_size
    split = " split rows" if config.sequence_parallel else ""

    return f"DP{options.ranks // tensor} TP{tensor}{split} ZeRO-{config.zero_stage}"


def describe_machine(options: Options, sizes: ModelConfig) -> Machine:
    """Describe a rank of this machine by measurements, in which all ranks take part at once."""
    half = dataclasses.replace(
        sizes,
        interaction_layers=(sizes.interaction_layers + 1) // 2,
        text_layers=(sizes.text_layers + 1) // 2,
        image_layers=(sizes.image_layers + 1) // 2,
    )
    step = Step(RunConfig(micro_batch_size=options.batch), half, options, alone=True)
    computed = slowest(step.passes, options.steps)
    flops = training_flops(half, step.batch)
    memory = ADDED_BYTES * ADDED / slowest(addition(), options.steps)
    others = other_bytes(half, Layout(), Tokens.of(step.batch)) / memory

    short, long = (one_collective("all_reduce", n, options) for n in LENGTHS)
    ring = [ring_seconds("all_reduce", 4 * n, options.ranks, 1.0) for n in LENGTHS]
    link = (ring[1] - ring[0]) / (long - short)
    slower = {}
    for operation in ("all_gather", "reduce_scatter"):
        taken = one_collective(operation, LENGTHS[1], options)
        given = 4 * LENGTHS[1] // (options.ranks if operation == "all_gather" else 1)
        slower[f"{operation}_slower"] = taken / ring_seconds(operation, given, options.ranks, link)

    return Machine(
        tflops=flops / max(computed - others, 0.1 * computed) / 1e12,
        memory_gib=0.0,
        memory_gb_s=memory / 1e9,
        link_gb_s=link,
        network_gb_s=link,
        per_node=options.ranks,
        efficiency=1.0,
        latency=max(short - ring[0] / link, 0.0) / hops(options.ranks),
        **slower,
    )


def mean_machine(machines: Sequence[Machine]) -> Machine:
    """Return the mean of several descriptions of a machine."""
    names = [entry.name for entry in dataclasses.fields(Machine)]
    means = {name: statistics.mean(getattr(one, name) for one in machines) for name in names}

    return Machine(**means)


def slowest(action: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of an action on its slowest rank, after two to warm up."""
    times = []
    for number in range(repeats + 2):
        dist.barrier()
        started = time.perf_counter()
        action()
        taken = torch.tensor(time.perf_counter() - started)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        if number > 1:
            times.append(float(taken))

    return statistics.median(times)


def one_collective(operation: str, elements: int, options: Options) -> float:
    """Return the seconds of a collective over all ranks on tensors of so many elements in all."""
    whole = torch.zeros(elements)
    part = torch.zeros(elements // options.ranks)
    actions = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
    }

    return slowest(actions[operation], 3 * options.steps)


def addition() -> Callable[[], Any]:
    """Return an addition of two long tensors, whose result is in memory that is fresh from the
    kernel, as that of gradients and their buckets is.
    """
    one, other = torch.zeros(2, ADDED)
    return lambda: one + other


class Step:
    """Run training steps of a model on a random batch in a layout; `alone`: every rank is one
    process.
    """

    def __init__(
        self, config: RunConfig, sizes: ModelConfig, options: Options, alone: bool = False
    ) -> None:
        device = torch.device("cpu")
        self.state = ParallelState(
            config.tensor_model_parallel_size, config.sequence_parallel, alone=alone
        )
        examples = random_examples(sizes, options.batch, seed=self.state.data_rank)
        self.batch: PackedBatch = pack(examples, sizes.feature_dim)
        self.task = PretrainingTask()
        self.streams = RandomStreams(0, self.state.data_rank, self.state.tensor_rank)
        job = Job(self.task, None, sizes, PRETRAINING_HEADS, {}, "")
        plan = ModelPlan(job, self.state, Kernels(), 0, recompute=False)
        if alone:
            self.model = plan.filled(self.streams, device, torch.float32)
            return

        self.engine = build_engine(plan, config, self.streams, device, plan.first_weights)

    def passes(self) -> None:
        """Run a forward and a backward pass of the bare model."""
        loss, _ = self.task.loss(self.model(self.batch), self.batch, self.batch.target_counts())
        loss.backward()
        self.model.zero_grad()

    def __call__(self) -> None:
        totals = self.state.sum_over_data(self.batch.target_counts())
        loss, _ = self.task.loss(self.engine.forward(self.batch), self.batch, totals)
        self.engine.backward(loss, last=True)
        self.engine.step(1e-4)


def in_layout(
    config: RunConfig, options: Options, sizes: ModelConfig
) -> tuple[Layout, Tokens, float]:
    """Return a layout, the tokens of a rank's batch, and the median seconds of a step."""
    step = Step(config, sizes, options)
    layout = layout_of(config, step.state.data_size, Kernels())

    return layout, Tokens.of(step.batch), slowest(step, options.steps)
