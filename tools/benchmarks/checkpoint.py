"""Measure what a save costs training, and how fast checkpoints are written, read, converted."""

import functools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.config.options import option
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.packing import pack
from megatron_interbert.errors import UsageError
from megatron_interbert.files import flush_file
from megatron_interbert.machines.processes import start_processes
from megatron_interbert.model.interbert import PRETRAINING_HEADS
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.checkpoint import Checkpoints, Progress
from megatron_interbert.training.model_plan import build_engine, plan_model
from megatron_interbert.virtual.samples import random_examples
from megatron_interbert.weights.output import Output
from megatron_interbert.weights.sources import open_weights
from megatron_interbert.weights.targets import write_target
from tools.benchmarks.batches import sizes_of
from tools.benchmarks.options import BenchmarkOptions


@dataclass
class Options(BenchmarkOptions):
    """Measure what a save costs training, and how fast checkpoints are written, read, converted."""

    model: str = option("base", "preset or JSON file of sizes", group="model")
    batch: int = option(32, "samples per step", least=1)
    zero_stage: int = option(1, "ZeRO stage of the engine", (0, 1, 2, 3))
    bf16: bool = option(False, "bfloat16 with fp32 master weights")
    repeats: int = option(5, "repeats of each measurement", least=1)


class TrainingStep:
    """Run training steps of a model on a fixed random batch through the engine."""

    def __init__(self, options: Options, save: Path) -> None:
        device = start_processes()
        self.config = RunConfig(
            save=str(save),
            micro_batch_size=options.batch,
            global_batch_size=options.batch,
            zero_stage=options.zero_stage,
            bf16=options.bf16,
            keep_last=1,
        )
        self.state = ParallelState()
        if self.state.world_size > 1:
            raise UsageError("benchmark checkpoint: expected one process; run it with no launcher")

        sizes = sizes_of(options.model)
        self.task = PretrainingTask()
        job = Job(self.task, None, sizes, PRETRAINING_HEADS, {}, "")
        plan = plan_model(self.config, job, self.state, device)
        self.engine = build_engine(plan, self.config, RandomStreams(0), device, plan.first_weights)
        self.batch = pack(random_examples(sizes, options.batch), sizes.feature_dim).to(device)
        vocabulary = save.parent / "vocab.txt"
        vocabulary.write_text("[PAD]\n")
        described = {"store": "", "manifest_sha256": "", "vocabulary": "", "detector": {}}
        self.checkpoints = Checkpoints(self.config, sizes, self.state, described, str(vocabulary))
        self.progress = Progress()

    def __call__(self) -> None:
        loss, _ = self.task.loss(
            self.engine.forward(self.batch), self.batch, self.batch.target_counts()
        )
        self.engine.backward(loss, last=True)
        self.engine.step(1e-4)
        self.progress.step += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    """Return the wall-clock seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure_saves(step: TrainingStep, folder: Path, repeats: int) -> dict[str, float]:
    """Return the median seconds of a step, of training's wait for our save, of our save until it is
    on disk, of a step while it is written, of copying its files (flushed), of reading it into the
    engine, and of DeepSpeed's save.
    """
    for _ in range(2):
        step()

    found: dict[str, list[float]] = {
        "step": [],
        "stall": [],
        "written": [],
        "step_while_writing": [],
        "copy": [],
        "read": [],
        "deepspeed_save": [],
    }
    for number in progress(range(repeats + 1), desc="saves", unit="round", leave=False):
        found["step"].append(seconds(step))
        started = time.perf_counter()
        step.checkpoints.save(step.engine, step.progress)
        found["stall"].append(time.perf_counter() - started)
        while step.checkpoints.writing():
            found["step_while_writing"].append(seconds(step))

        step.checkpoints.wait()
        found["written"].append(
            float(step.checkpoints.messages()[-1].split("on disk after ")[1].split()[0])
        )
        saved = step.checkpoints.newest
        copy = functools.partial(shutil.copytree, copy_function=copy_flushed)
        found["copy"].append(seconds(functools.partial(copy, saved, folder / "copy")))
        shutil.rmtree(folder / "copy")
        found["read"].append(seconds(functools.partial(step.checkpoints.load, step.engine, saved)))
        theirs = folder / "deepspeed"
        found["deepspeed_save"].append(
            seconds(lambda to=theirs: step.engine.deepspeed.save_checkpoint(str(to), tag="x"))
        )
        shutil.rmtree(theirs)
        if number == 0:  # the first of each allocates buffers and warms up
            found = {name: [] for name in found}

    return {name: statistics.median(values) for name, values in found.items() if values}


def copy_flushed(file: str | Path, to: str | Path) -> None:
    """Copy a file and wait until the copy is on disk."""
    flush_file(Path(shutil.copyfile(file, to)))


def measure_conversion(step: TrainingStep, folder: Path, repeats: int) -> dict[str, float]:
    """Return the MB/s of tensors of a plain copy of the file to the same disk (flushed), and of
    conversion to each format.
    """
    source = open_weights(step.config.save)
    megabytes = Output(source).bytes() / 1e6
    file = next(source.path.glob("weights-*"))
    ways: dict[str, Callable[[Path], Any]] = {"copy": functools.partial(copy_flushed, file)}

    for kind, ranks in (("sharded", 1), ("sharded", 2), ("huggingface", 1), ("official", 1)):
        name = f"{kind} TP{ranks}" if kind == "sharded" else kind
        ways[name] = lambda to, kind=kind, ranks=ranks: write_target(
            kind, Output(source, tensor_parallel=ranks), to
        )

    speeds: dict[str, list[float]] = {name: [] for name in ways}
    # in turns, so that a slow moment of the disk affects all
    for _ in progress(range(repeats), desc="conversions", unit="round", leave=False):
        for name, way in ways.items():
            target = folder / "converted"
            speeds[name].append(megabytes / seconds(lambda way=way, target=target: way(target)))
            shutil.rmtree(target) if target.is_dir() else target.unlink()

    return {name: statistics.median(values) for name, values in speeds.items()}


def measure(options: Options) -> dict[str, Any]:
    """Measure saves and conversions, print the table and return its figures."""
    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        folder = Path(name)
        step = TrainingStep(options, folder / "run")
        saves = measure_saves(step, folder, options.repeats)
        speeds = measure_conversion(step, folder, options.repeats)

    print(
        f"model {options.model}, batch {options.batch}, ZeRO-{options.zero_stage},"
        f" {step.engine.precision}, medians of {options.repeats}"
    )
    print(f"{'training step':<52}{saves['step']:>9.3f} s")
    rows = [
        ("training waits for our save", "stall"),
        ("DeepSpeed's engine.save_checkpoint (not flushed)", "deepspeed_save"),
        ("our save until it is on disk, flushed, hashed", "written"),
        ("a step while our save is written", "step_while_writing"),
        ("a copy of our save's files from the page cache, flushed", "copy"),
        ("our save read into the engine, from the page cache", "read"),
    ]
    for title, key in rows:
        if key in saves:
            print(f"{title:<56}{saves[key]:>5.3f} s  {saves[key] / saves['step']:>7.2f} of a step")

    for title, speed in speeds.items():
        print(f"{title:<52}{speed:>9.0f} MB/s {speed / speeds['copy']:>6.2f} of a copy")

    return {"seconds": saves, "megabytes_per_second": speeds}
