"""Measure steps of the base model in bf16 through our engine, and where their time goes."""

import functools
import gc
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.packing import Example, PackedBatch, pack
from megatron_interbert.errors import UsageError
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.machines.processes import start_processes
from megatron_interbert.model.flops import training_flops
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.planning.layout import Layout, Load
from megatron_interbert.planning.memory import predict
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.training.engine import Engine
from megatron_interbert.training.peaks import peak_tflops
from megatron_interbert.virtual.samples import random_examples
from tests.gpu.stages.data import base_store
from tests.gpu.stages.place import Place, Record
from tests.gpu.stages.programs import module
from tests.gpu.stages.trace import profile_steps

WORDS = (8, 20)  # text tokens per sample (from, to)
WARM = 5  # warm-up steps, in which kernels are compiled and memory is allocated
PROFILED = 3
MOST_KEYS = 4  # most programs per kernel that ragged lengths may need
NEAR = 1.25  # the prediction of memory may be off by this factor
ROOM = 0.9  # share of the GPU's memory that a setting may need by prediction


@dataclass(frozen=True)
class Setting:
    """Describe a micro-batch: its samples, and their regions (from, to)."""

    samples: int
    regions: tuple[int, int]

    @property
    def name(self) -> str:
        """Return a name for the record."""
        low, high = self.regions
        return f"{self.samples} x {high}" if low == high else f"{self.samples} x {low}-{high}"


class Steps:
    """Hold our engine around the model; `step` trains on one batch."""

    def __init__(
        self, place: Place, samples: int, kernels: str = "auto", fp8: bool = False
    ) -> None:
        self.place = place
        sizes = place.sizes
        dropout = max(sizes.attention_dropout, sizes.image_attention_dropout) > 0
        device = place.device
        self.state = ParallelState()
        config = RunConfig(
            micro_batch_size=samples, global_batch_size=samples, bf16=True, zero_stage=1
        )
        config.check()
        self.kernels = choose_kernels(
            kernels, device, dropout, fp8=fp8, head_sizes=sizes.head_sizes, dtype=torch.bfloat16
        )
        self.streams = RandomStreams(0, device=device, alone=True)
        model = InterBert(sizes, state=self.state, kernels=self.kernels, streams=self.streams)
        initialise(model, sizes, 0, self.state)
        self.engine = Engine(model.to(device), config, self.state)
        self.task = PretrainingTask()
        self.number = 0

    def step(self, batch: PackedBatch, targets: torch.Tensor) -> None:
        """Run forward, backward and update. `targets`: the batch's number for each loss."""
        self.number += 1
        totals = self.state.sum_over_data(targets)
        self.streams.start_step(self.number)
        self.loss = self.task.loss(self.engine.forward(batch), batch, totals)[0]
        self.engine.backward(self.loss, last=True)
        self.norm, _ = self.engine.step(1e-4)


class Batches:
    """Draw batches of changing samples, hence of changing lengths, from a random pool."""

    def __init__(self, place: Place, setting: Setting) -> None:
        self.place = place
        self.samples = setting.samples
        self.random = np.random.default_rng(0)
        self.width = place.sizes.feature_dim
        self.pool: list[Example] = random_examples(
            place.sizes, 5 * setting.samples // 4, WORDS, setting.regions
        )

    def next(self) -> tuple[PackedBatch, torch.Tensor]:
        """Return a batch and the counts of its targets, both on the device."""
        some = self.random.choice(len(self.pool), self.samples, replace=False)
        batch = pack([self.pool[number] for number in some], self.width)
        targets = batch.target_counts().to(self.place.device)
        return batch.to(self.place.device), targets


def measure_steps(place: Place, record: Record) -> None:
    """Measure rates at micro-batch 256 and 1,024, with ragged regions, and of `pretrain`."""
    start_processes()
    settings = place.choose(
        [Setting(256, (36, 36)), Setting(256, (10, 36)), Setting(1024, (36, 36))],
        [Setting(8, (6, 6)), Setting(8, (2, 6))],
    )
    steps = Steps(place, settings[0].samples)
    record.note(
        kernels=steps.kernels.describe(),
        parameters=sum(p.numel() for p in steps.engine.model.parameters()),
    )

    for setting in settings:
        if needed := too_large(place, setting):
            record.say(f"{setting.name}: left out, it needs about {needed:.0f} GiB")
            continue

        measure_setting(place, record, steps, setting)

    check_programs(record)
    del steps
    free(place)
    measure_program(place, record)


def load_of(setting: Setting, batch: PackedBatch | None = None) -> Load:
    """Describe a micro-batch for planning/memory.py: as packed, or as expected without one."""
    words = sum(WORDS) / 2
    regions = sum(setting.regions) / 2
    if batch is not None:
        words = len(batch.token_ids) / len(batch)
        regions = len(batch.features) / len(batch)

    return Load(setting.samples, words, regions, WORDS[1], setting.regions[1])


def predicted(place: Place, load: Load) -> float:
    """Return the predicted peak bytes of a step."""
    layout = Layout(zero_stage=1, half=True, fused=not place.pretended)
    return predict(place.sizes, layout, load).peak


def too_large(place: Place, setting: Setting) -> float:
    """Return the GiB that a setting needs if the GPU has too little; 0 if it has enough."""
    if place.pretended:
        return 0.0
    needed = predicted(place, load_of(setting))
    return 0.0 if needed < ROOM * torch.cuda.mem_get_info()[1] else needed / 2**30


def measure_setting(place: Place, record: Record, steps: Steps, setting: Setting) -> None:
    """Record the time of every step, compilations, a profile, and peak memory."""
    batches = Batches(place, setting)
    number = place.choose(60, 7)
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    seconds = []
    compiled = []
    flops = []
    tokens = []

    for _ in range(number):
        batch, targets = batches.next()
        before = compiled_programs()
        seconds.append(place.seconds(functools.partial(steps.step, batch, targets)))
        compiled.append(compiled_programs() - before)
        flops.append(training_flops(place.sizes, batch))
        tokens.append(len(batch.joint_order))

    check_finite(record, setting.name, steps)

    step = statistics.median(seconds[WARM:])
    rate = setting.samples / step
    tflops = statistics.mean(flops[WARM:]) / step / 1e12
    peak = peak_tflops(place.device, 0.0)
    figures: dict[str, Any] = {
        "step_ms": 1000 * step,
        "slowest_ms": 1000 * max(seconds[WARM:]),
        "samples_per_second": rate,
        "tokens_per_second": statistics.mean(tokens[WARM:]) / step,
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "compiled_first": sum(compiled[:WARM]),
        "compiled_later": sum(compiled[WARM:]),
        "seconds": [round(s, 5) for s in seconds],
        "compiled": compiled,
        **memory_figures(place, record, setting, batch),
    }
    record.note(**{setting.name: figures})
    say_figures(record, setting, figures)

    try:
        note_profile(place, record, setting, steps, batches, step)
    except RuntimeError as error:  # a machine may refuse the counters; other figures hold
        record.expect(False, f"{setting.name}: no profile: {' '.join(str(error).split())[:160]}")


def memory_figures(
    place: Place, record: Record, setting: Setting, batch: PackedBatch
) -> dict[str, Any]:
    """Return GiB: predicted for the actual lengths, and on a GPU the allocator's peak."""
    expected = predicted(place, load_of(setting, batch))
    figures: dict[str, Any] = {"predicted_gib": expected / 2**30}

    if place.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        figures["peak_gib"] = peak / 2**30
        record.expect(
            1 / NEAR < peak / expected < NEAR,
            f"{setting.name}: peak memory {peak / 2**30:.2f} GiB, predicted {expected / 2**30:.2f}",
        )

    return figures


def note_profile(
    place: Place,
    record: Record,
    setting: Setting,
    steps: Steps,
    batches: Batches,
    step: float,
) -> None:
    """Profile PROFILED steps. The idle share refers to a step of `step` seconds, timed without the
    profiler, which slows the host.
    """
    some = [batches.next() for _ in range(PROFILED)]

    def work() -> None:
        for batch, targets in some:
            steps.step(batch, targets)

    figures = profile_steps(work, PROFILED, place.device)
    if place.device.type == "cuda":
        record.expect(
            figures["launches"] > 0, f"{setting.name}: the profiler saw nothing on the GPU"
        )
        idle = figures["idle_share"] = max(0.0, 1 - figures["busy_ms"] / (1000 * step))
        record.say(f"  GPU idle {idle:.0%} of a step, {figures['launches']:.0f} launches")

    record.note(**{f"{setting.name}, profile": figures})


def say_figures(record: Record, setting: Setting, figures: dict[str, Any]) -> None:
    """Report a setting's figures in the table."""
    mfu = f"MFU {figures['mfu']:.1%}" if figures["mfu"] else "MFU not known"
    record.say(
        f"{setting.name} regions: {figures['samples_per_second']:.0f} samples/s,"
        f" {figures['step_ms']:.1f} ms, {figures['tflops']:.3g} TFLOP/s, {mfu},"
        f" compiled {figures['compiled_first']} + {figures['compiled_later']}"
    )

    if "peak_gib" in figures:
        peak = figures["peak_gib"]
        expected = figures["predicted_gib"]
        record.say(f"  peak memory {peak:.1f} GiB, predicted {expected:.1f}")


def programs_by_kernel() -> dict[str, int]:
    """Count the programs compiled for each kernel that we launch; empty without Triton."""
    try:
        from tests.kernels.compiling import launched_kernels
    except ImportError:
        return {}

    return {
        kernel.fn.__name__: sum(
            len(cache) for cache, *_ in getattr(kernel, "device_caches", {}).values()
        )
        for kernel in launched_kernels()
    }


def compiled_programs() -> int:
    """Count the programs of all kernels so far."""
    return sum(programs_by_kernel().values())


def check_programs(record: Record) -> None:
    """Check, after all settings, that ragged lengths needed no more programs than tiles do."""
    counts = programs_by_kernel()
    record.note(programs=counts)
    for name, count in counts.items():
        record.expect(
            count <= MOST_KEYS, f"{name} was compiled {count} times, expected {MOST_KEYS} at most"
        )


def free(place: Place) -> None:
    """Return the memory of deleted tensors to the device."""
    gc.collect()
    if place.device.type == "cuda":
        torch.cuda.empty_cache()


def measure_program(place: Place, record: Record) -> None:
    """Measure `pretrain` itself with its loader, from a store on disk."""
    folder = place.scratch / "program"
    number = place.choose(40, 4)
    ended = module(
        "pretrain",
        *("--model", place.model, "--data-path", base_store(place), "--bf16", "--save", folder),
        *("--micro-batch-size", place.choose(256, 8), "--train-iters", number),
        *("--log-interval", number // 2, "--num-workers", place.choose(8, 1), "--keep-last", 1),
    ).wait()
    record.expect(ended.code == 0, f"pretrain: code {ended.code}: {ended.last}")
    if ended.code:
        return

    *_, last = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = ("samples_per_second", "data_wait_share", "mfu", "memory_gib")
    record.note(pretrain={name: last[name] for name in kept if name in last})
    shutil.rmtree(folder)  # 2 GB
    record.say(
        f"pretrain itself, 10-36 regions: {last['samples_per_second']:.0f} samples/s,"
        f" {last['data_wait_share']:.0%} of the time waiting for data"
    )


def measure_ratios(place: Place, record: Record) -> None:
    """Time steps with Triton's kernels, plain torch's, and in 8 bits, on the same batches."""
    start_processes()
    setting = place.choose(Setting(256, (36, 36)), Setting(8, (6, 6)))
    batches = Batches(place, setting)
    some = [batches.next() for _ in range(place.choose(15, WARM + 2))]
    ways = {"ours": {}, "--kernels torch": {"kernels": "torch"}, "--fp8": {"fp8": True}}
    took: dict[str, float] = {}

    for name, options in ways.items():
        try:
            took[name] = time_way(place, record, name, some, options)
        except UsageError as reason:  # a GPU without 8-bit products
            record.say(f"{name}: left out: {reason}")
            continue

        record.note(**{f"{name}_ms": 1000 * took[name], f"{name}_ratio": took[name] / took["ours"]})

    told = ", ".join(f"{name} {seconds / took['ours']:.2f}" for name, seconds in took.items())
    record.say(f"time of a step in times of ours: {told}")


def time_way(
    place: Place,
    record: Record,
    name: str,
    batches: Sequence[tuple[PackedBatch, torch.Tensor]],
    options: dict[str, Any],
) -> float:
    """Return the seconds of a step on an engine of its own, which is freed afterwards."""
    steps = Steps(place, len(batches[0][0]), **options)
    seconds = [place.seconds(functools.partial(steps.step, *batch)) for batch in batches]
    check_finite(record, name, steps)
    del steps
    free(place)

    return statistics.median(seconds[WARM:])


def check_finite(record: Record, name: str, steps: Steps) -> None:
    """Check that the last step had a finite loss and gradient norm."""
    loss = steps.loss.item()
    norm = steps.norm
    record.note(**{f"{name}_loss": loss, f"{name}_norm": norm})
    record.expect(math.isfinite(loss + norm), f"{name}: loss {loss}, gradient norm {norm}")
