"""Measure training steps of our model and of what a user would run instead, on the same samples, in
turns and in separate processes.

With several data-parallel ranks each contender runs twice: once its ranks train together, once each
on its own, at the same time. The extra time of a step together is communication that is not hidden
by computation.
"""

import contextlib
import os
import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.options import option
from megatron_interbert.config.words import span
from megatron_interbert.data.packing import Example, pack
from megatron_interbert.errors import TrainingStopped, UsageError
from megatron_interbert.files import check_writable
from megatron_interbert.kernels import plain
from megatron_interbert.kernels.choice import Kernels, choose_kernels
from megatron_interbert.machines.processes import aligned, start_processes
from megatron_interbert.model.flops import training_flops
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.device import this_device
from megatron_interbert.parallel.launch import free_port
from megatron_interbert.progress import progress
from megatron_interbert.reading import read_json
from megatron_interbert.training.peaks import peak_tflops
from megatron_interbert.virtual.samples import random_examples
from tools.benchmarks.bars import bars
from tools.benchmarks.batches import ANSWERS, questions, sizes_of
from tools.benchmarks.contenders import Contender, Ours, OursForAnswers, Padded
from tools.benchmarks.options import BenchmarkOptions
from tools.benchmarks.padded import (
    Lxmert,
    LxmertForAnswers,
    PaddedInterBert,
    VisualBert,
    parameters,
)

TWIN = Kernels(plain.attention, plain.bias_gelu, plain.dropout_add_norm)
FIGURES = 0  # request to a worker for its figures; other numbers request as many steps
SAME_WORK = (
    "model",
    "task",
    "batch",
    "ranks",
    "words",
    "regions",
    "max_tokens",
    "max_regions",
    "bf16",
)  # options that must be equal for times to be comparable
BEFORE = {"task": "pretraining"}  # of measurements that do not say


@dataclass
class Options(BenchmarkOptions):
    """Measure training steps of our model and of what a user would run instead."""

    model: str = option("base", "preset or JSON file of model sizes", group="model")
    task: str = option(
        "pretraining",
        f"what is trained: three objectives, or answers to questions ({ANSWERS:,}, as in VQA)",
        ("pretraining", "vqa"),
    )
    batch: int = option(16, "samples per step", least=1)
    words: tuple[int, int] = option(
        (8, 20), "tokens per sample with [CLS] and [SEP], from-to; default: 8-20", read=span
    )
    regions: tuple[int, int] = option(
        (36, 36), "regions per sample, from-to; default: 36", read=span
    )
    max_tokens: int = option(36, "tokens to which the others pad")
    max_regions: int = option(0, "regions to which the others pad; default: the upper --regions")
    rounds: int = option(5, "rounds in which all contenders run one after another", least=1)
    steps: int = option(2, "steps of a contender per round", least=1)
    ranks: int = option(1, "data-parallel ranks of each contender, with a batch each", least=1)
    bf16: bool = option(False, "bfloat16: our engine's, and autocast for the others")
    zero_stage: int = option(
        0, "ZeRO stage of our engine; default: 0, or 1 with --bf16", (0, 1, 2, 3)
    )
    only: str = option("", "contenders, comma-separated; default: all of them")
    peak_tflops: float = option(0.0, "dense peak TFLOP/s of the device; 0: looked up by its name")
    plot: Path | None = option(
        None, "SVG file for a picture of the table", read=Path, group="logging"
    )
    compare: Path | None = option(
        None,
        "earlier --output: fail if our lead over a contender has shrunk since",
        read=Path,
        group="logging",
    )
    tolerance: float = option(0.2, "share by which a recorded ratio may shrink", group="logging")


def contenders(options: Options, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """Return the makers of all contenders by name; ours comes first."""
    sizes = sizes_of(options.model)

    def draw(number: int) -> list[Example]:
        return samples_of(options, sizes, number)

    dropout = max(sizes.attention_dropout, sizes.image_attention_dropout) > 0
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    with torch.device("meta"):
        # that transformers' models should have, whatever the task
        values = parameters(InterBert(sizes))

    asks = options.task == "vqa"
    kind = OursForAnswers if asks else Ours

    def ours(kernels: Kernels) -> Callable[[], Contender]:
        stage = options.zero_stage if "zero_stage" in options.given else int(options.bf16)
        return lambda: kind(sizes, draw, device, options.bf16, kernels, stage)

    def padded(make: Callable[[], nn.Module]) -> Callable[[], Contender]:
        regions = options.max_regions or options.regions[1]
        return lambda: Padded(make(), draw, options.max_tokens, regions, device, options.bf16)

    found = {
        "ours": ours(choose_kernels("auto", device, dropout, dtype=dtype)),
        "ours by plain twins": ours(TWIN),
    }
    if asks:
        found["LXMERT"] = padded(lambda: LxmertForAnswers(sizes, values))
    else:
        found["padded InterBERT"] = padded(lambda: PaddedInterBert(sizes))
        found["LXMERT"] = padded(lambda: Lxmert(sizes, values))
        found["VisualBERT"] = padded(lambda: VisualBert(sizes, values))

    with contextlib.suppress(UsageError):  # if NVIDIA's apex is installed
        found["ours by apex"] = ours(choose_kernels("apex", device, dropout, dtype=dtype))
    if options.bf16 and device.type == "cuda":
        with contextlib.suppress(UsageError):  # if the GPU has 8-bit products
            found["ours in 8 bits"] = ours(
                choose_kernels("auto", device, dropout, fp8=True, dtype=dtype)
            )

    wanted = [name.strip() for name in options.only.split(",")] if options.only else list(found)
    if unknown := [name for name in wanted if name not in found]:
        raise UsageError(f"--only {unknown[0]}: no such contender; choose from {', '.join(found)}")
    if not any(name.startswith("ours") for name in wanted):
        raise UsageError("--only needs one of ours, with which the others are compared")

    return {name: found[name] for name in found if name in wanted}


class Worker:
    """Hold the ranks of a contender, each in its own process, which wait while others run.

    It is ready, its first step done, once it is constructed.
    """

    def __init__(self, options: Options, name: str, together: bool = True) -> None:
        context = get_context("spawn")
        port = free_port()
        self.name = name
        self.lines = []
        self.processes = []

        for rank in range(options.ranks):
            mine, theirs = context.Pipe()
            place = (
                {"RANK": rank, "WORLD_SIZE": options.ranks}
                if together
                else {"RANK": 0, "WORLD_SIZE": 1}
            )

            place |= {
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": options.ranks,
                "MASTER_PORT": port if together else free_port(),
            }
            self.processes.append(
                context.Process(target=_serve, args=(theirs, options, name, place), daemon=True)
            )
            self.processes[-1].start()
            theirs.close()
            self.lines.append(mine)

        self._receive()  # otherwise its first step would still run while the others are timed

    def turn(self, steps: int) -> float:
        """Run `steps` steps and return their median seconds, each that of the slowest rank."""
        of_ranks = self._ask(steps)
        return statistics.median(max(seconds) for seconds in zip(*of_ranks, strict=True))

    def figures(self) -> dict[str, Any]:
        """Return the figures of the first rank."""
        return self._ask(FIGURES)[0]

    def stop(self) -> None:
        """Kill the processes."""
        for process in self.processes:
            process.kill()

    def _ask(self, what: int) -> list[Any]:
        for line in self.lines:
            line.send(what)
        return self._receive()

    def _receive(self) -> list[Any]:
        try:
            while not all(line.poll(0.2) for line in self.lines):
                # the others would wait for a dead one for ever
                if not all(process.is_alive() for process in self.processes):
                    raise EOFError

            return [line.recv() for line in self.lines]
        except EOFError:
            raise TrainingStopped(
                f"{self.name} ended before it was measured; see its message above"
            ) from None


def _serve(line: Connection, options: Options, name: str, place: dict[str, int]) -> None:
    os.environ.update(
        {variable: str(value) for variable, value in place.items()}, MASTER_ADDR="127.0.0.1"
    )
    device = this_device()
    if name.startswith("ours") or options.ranks > 1:
        start_processes()

    before = peak_resident()
    contender = contenders(options, device)[name]()
    contender.first_step()
    leave_memory(device)
    line.send("ready")

    while True:
        asked = line.recv()
        if asked != FIGURES:
            line.send(take_turn(contender, asked))
        else:
            on_gpu = device.type == "cuda"
            memory = (
                torch.cuda.max_memory_allocated() / 2**30 if on_gpu else peak_resident() - before
            )
            line.send({**contender.figures(), "peak_memory_gib": memory})


def take_turn(contender: Contender, steps: int) -> list[float]:
    """Run `steps` steps, return their seconds, and leave a GPU's memory to the next contender."""
    if contender.device.type == "cuda":
        contender.step()  # allocates memory again

    seconds = [contender.step() for _ in range(steps)]
    leave_memory(contender.device)

    return seconds


def leave_memory(device: torch.device) -> None:
    """Release the GPU memory that torch caches."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(options: Options) -> dict[str, Any]:
    """Measure all contenders, print their figures as a table and return them."""
    check(options)
    device = this_device()
    names = list(contenders(options, device))
    recorded = read_recorded(options, names[1:]) if options.compare else None

    workers = {name: Worker(options, name) for name in names}
    apart = {}
    if options.ranks > 1:
        apart = {name: Worker(options, name, together=False) for name in names}

    rounds, longer = time_rounds(options, workers, apart)
    result: dict[str, Any] = {
        "samples": options.batch,
        "ranks": options.ranks,
        "contenders": {
            name: figures_of(options, device, worker, rounds[name], rounds[names[0]], longer[name])
            for name, worker in workers.items()
        },
    }

    for worker in (*workers.values(), *apart.values()):
        worker.stop()

    print("\n".join(table(result)))
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_text(bars(result), encoding="utf-8")

    if recorded:
        compare(result, recorded, options)

    return result


def time_rounds(
    options: Options, workers: dict[str, Worker], apart: dict[str, Worker]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds per step of each round, by contender, of all ranks together, and how much
    longer that is than the ranks `apart` take (empty with one rank).
    """
    rounds: dict[str, list[float]] = {name: [] for name in workers}
    longer: dict[str, list[float]] = {name: [] for name in workers}

    with progress(
        total=options.rounds * len(workers), unit="contender", desc="contenders", leave=False
    ) as bar:
        for _ in range(options.rounds):
            for name, worker in workers.items():
                rounds[name].append(worker.turn(options.steps))
                if apart:
                    longer[name].append(rounds[name][-1] - apart[name].turn(options.steps))
                bar.update()

    return rounds, longer


def figures_of(
    options: Options,
    device: torch.device,
    worker: Worker,
    rounds: list[float],
    base: list[float],
    longer: list[float],
) -> dict[str, Any]:
    """Return the figures of one contender from its seconds per step and those of `base`."""
    ranks = options.ranks
    seconds = statistics.median(rounds)
    ratios = [mine / theirs for mine, theirs in zip(rounds, base, strict=True)]

    figures = worker.figures()
    for name in ("tokens", "flops", "padded_tokens"):
        if name in figures:
            figures[name] *= ranks

    if longer:
        figures["parts"]["communication"] = statistics.median(longer)

    figures["samples_per_second"] = ranks * options.batch / seconds
    figures["real_tokens_per_second"] = figures["tokens"] / seconds
    figures["time_of_ours"] = statistics.median(ratios)
    figures["time_of_ours_range"] = [min(ratios), max(ratios)]

    peak = ranks * peak_tflops(device, options.peak_tflops)
    figures["tflops"] = figures["flops"] / seconds / 1e12
    figures["tflops_on_real_tokens"] = ranks * needed_flops(options) / seconds / 1e12
    figures["mfu"] = figures["tflops_on_real_tokens"] / peak if peak else None
    if "padded_tokens" in figures:
        figures["padded_tokens_per_second"] = figures.pop("padded_tokens") / seconds

    return figures


def compare(result: dict[str, Any], recorded: dict[str, Any], options: Options) -> None:
    """Raise TrainingStopped if our lead is smaller than the recorded one, beyond --tolerance."""
    if lost := shrunk(result, recorded, options.tolerance):
        raise TrainingStopped(f"our lead has shrunk since {options.compare}: {'; '.join(lost)}")

    print(f"no lead has shrunk by more than {options.tolerance:.0%} since {options.compare}")


def check(options: Options) -> None:
    """Raise UsageError for options that contradict each other or cannot be met."""
    if not 0 <= options.tolerance < 1:
        raise UsageError(
            f"--tolerance is {options.tolerance}, expected a share from 0 up to 1, such as 0.2"
        )

    if options.bf16 and not options.zero_stage and "zero_stage" in options.given:
        raise UsageError("--bf16 needs --zero-stage 1 or higher")
    for flag, path in (("--plot", options.plot), ("--output", options.output)):
        if path:
            check_writable(Path(path).parent, flag)


def read_recorded(options: Options, names: list[str]) -> dict[str, Any]:
    """Read the measurement of --compare; raises UsageError unless it was of the same work and of
    one or more of the contenders `names`.
    """
    recorded = read_json(options.compare, "--compare")
    if not {"contenders", "arguments"} <= recorded.keys():
        raise UsageError(
            f"--compare {options.compare}: not written by `tools/benchmark.py train --output`"
        )

    for name in SAME_WORK:
        before = recorded["arguments"].get(name, BEFORE.get(name))
        now = str(getattr(options, name))
        if before != now:
            raise UsageError(
                f"--compare {options.compare}: measured with --{name.replace('_', '-')} {before},"
                f" now it is {now}"
            )

    if not set(names) & set(recorded["contenders"]):
        raise UsageError(
            f"--compare {options.compare}: none of {', '.join(names) or 'the others'} was"
            " measured then"
        )

    return recorded


def shrunk(result: dict[str, Any], recorded: dict[str, Any], tolerance: float) -> list[str]:
    """Describe contenders whose time relative to ours has, in every round, fallen below the
    recorded one by more than the share `tolerance`.
    """
    pairs = [
        (name, figures, recorded["contenders"].get(name))
        for name, figures in result["contenders"].items()
    ]
    return [
        f"{name} took {before['time_of_ours']:.2f} of our time and now takes"
        f" {now['time_of_ours']:.2f}"
        for name, now, before in pairs
        if before and now["time_of_ours_range"][1] < before["time_of_ours"] * (1 - tolerance)
    ]


def needed_flops(options: Options) -> float:
    """Return the FLOPs of a step without padding for our model, by which others are judged too."""
    sizes = sizes_of(options.model)
    return training_flops(sizes, pack(samples_of(options, sizes, 0), sizes.feature_dim))


def samples_of(options: Options, sizes: ModelConfig, number: int) -> list[Example]:
    """Draw the samples of a step."""
    drawn = random_examples(sizes, options.batch, options.words, options.regions, number)
    return questions(drawn) if options.task == "vqa" else drawn


def table(result: dict[str, Any]) -> list[str]:
    """Return the table of figures, a line for each contender."""
    head = (
        "",
        "parameters",
        "samples/s",
        "real tokens/s",
        "TFLOP/s",
        "on real tokens",
        "times our time (range)",
        "memory GiB",
        *next(iter(result["contenders"].values()))["parts"],
        "products forward",
        "products backward",
    )
    rows = []

    for name, f in result["contenders"].items():
        low, high = f["time_of_ours_range"]
        rows.append(
            (
                name,
                f"{f['parameters'] / 1e6:.1f} M",
                f"{f['samples_per_second']:.2f}",
                f"{f['real_tokens_per_second']:.0f}",
                f"{f['tflops']:.3f}",
                f"{f['tflops_on_real_tokens']:.3f}",
                f"{f['time_of_ours']:.2f} ({low:.2f}-{high:.2f})",
                f"{f['peak_memory_gib']:.2f}",
                *(f"{1000 * seconds:.0f} ms" for seconds in f["parts"].values()),
                *(f"{1000 * seconds:.0f} ms" for seconds in f["products"].values()),
            )
        )

    return aligned([head, *rows])


def peak_resident() -> float:
    """Return the peak resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
