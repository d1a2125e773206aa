"""Training steps of our model and of what a user would run instead: same sizes, samples, precision; in turn, in one process."""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_interbert.config import ModelConfig, RunConfig
from megatron_interbert.data.packing import Example, pack
from megatron_interbert.errors import UsageError
from megatron_interbert.kernels import plain
from megatron_interbert.kernels.choice import Kernels, choose_kernels
from megatron_interbert.model.flops import training_flops
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.presets import load_model_config
from megatron_interbert.parallel.state import ParallelState, this_device
from megatron_interbert.tasks.pretraining import PretrainingTask
from megatron_interbert.training.engine import Engine
from megatron_interbert.training.metrics import peak_tflops
from megatron_interbert.training.processes import aligned, start_processes
from tools.benchmarks.batches import PaddedBatch, pad, random_examples
from tools.benchmarks.padded import Lxmert, PaddedInterBert, VisualBert, parameters

TWIN = Kernels(plain.attention, plain.bias_gelu, plain.dropout_add_norm)
PARTS = ("data", "forward", "backward", "optimizer")


class Contender:
    """One way to train: `step()` makes its batch from the samples and trains on it, and notes the seconds of each part."""

    def __init__(self, examples: list[Example], device: torch.device) -> None:
        self.examples, self.device = examples, device
        self.seconds: dict[str, list[float]] = {name: [] for name in PARTS}

    def step(self) -> float:
        """Seconds of one whole step."""
        marks = [self._now()]
        for part in (self.make_batch, self.forward, self.backward, self.update):
            part()
            marks.append(self._now())
        for name, begin, end in zip(PARTS, marks[:-1], marks[1:], strict=True):
            self.seconds[name].append(end - begin)
        return marks[-1] - marks[0]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def make_batch(self) -> None:
        """From samples to tensors on the device."""
        raise NotImplementedError

    def forward(self) -> None:
        """To the loss."""
        raise NotImplementedError

    def backward(self) -> None:
        """To the gradients."""
        raise NotImplementedError

    def update(self) -> None:
        """Clip and update."""
        raise NotImplementedError


class Ours(Contender):
    """Our model through our engine, as `pretrain` steps it."""

    def __init__(
        self, sizes: ModelConfig, examples: list[Example], device: torch.device, bf16: bool, kernels: Kernels, zero_stage: int
    ) -> None:
        super().__init__(examples, device)
        config = RunConfig(micro_batch_size=len(examples), global_batch_size=len(examples), bf16=bf16, zero_stage=zero_stage)
        state = ParallelState()
        model = InterBert(sizes, state=state, kernels=kernels)
        initialise(model, sizes, 0, state)
        self.engine, self.task = Engine(model.to(device), config, state), PretrainingTask()

    def make_batch(self) -> None:
        self.batch = pack(self.examples, self.examples[0].features.shape[1]).to(self.device)

    def forward(self) -> None:
        self.loss = self.task.loss(self.engine.forward(self.batch), self.batch, self.batch.target_counts())[0]

    def backward(self) -> None:
        self.engine.backward(self.loss, last=True)

    def update(self) -> None:
        self.engine.step(1e-4)


class Padded(Contender):
    """A module over padded batches with torch's AdamW, autocast and clipping, as training scripts write it."""

    def __init__(
        self, model: nn.Module, examples: list[Example], tokens: int, regions: int, device: torch.device, bf16: bool
    ) -> None:
        super().__init__(examples, device)
        self.model, self.tokens, self.regions, self.bf16 = model.to(device).train(), tokens, regions, bf16
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def make_batch(self) -> None:
        batch = pad(self.examples, self.tokens, self.regions)
        self.batch = PaddedBatch(**{name: value.to(self.device) for name, value in vars(batch).items()})

    def forward(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            self.loss = self.model(self.batch)

    def backward(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this subject."""
    parser.add_argument("--model", default="base", help="preset or JSON file of model sizes")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    parser.add_argument("--words", type=span, default=(8, 20), help="tokens of a sample with [CLS] and [SEP], from-to")
    parser.add_argument("--regions", type=span, default=(36, 36), help="regions of a sample, from-to")
    parser.add_argument("--max-tokens", type=int, default=36, help="tokens to which others pad")
    parser.add_argument("--max-regions", type=int, default=0, help="regions to which others pad; default: the most there are")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which all contenders run one after another")
    parser.add_argument("--steps", type=int, default=2, help="steps of a contender in a round")
    parser.add_argument("--bf16", action="store_true", help="bfloat16: our engine's, and autocast for the others")
    parser.add_argument("--zero-stage", type=int, default=1, help="of our engine")
    parser.add_argument("--only", default="", help="contenders, by commas; default: all of them")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="peak of the device, where it is not known")


def span(text: str) -> tuple[int, int]:
    """`36` or `10-100`."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def contenders(arguments: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """Makers of all that take part, by name; ours is the first."""
    sizes = load_model_config(arguments.model)
    if not (sizes.vocab_size and sizes.feature_dim and sizes.num_classes):
        sizes = dataclasses.replace(sizes, vocab_size=1000, feature_dim=64, num_classes=100)
    examples = random_examples(sizes, arguments.batch, arguments.words, arguments.regions)
    dropout = max(sizes.attention_dropout, sizes.image_attention_dropout) > 0
    with torch.device("meta"):
        values = parameters(InterBert(sizes))

    def ours(kernels: Kernels) -> Callable[[], Contender]:
        return lambda: Ours(sizes, examples, device, arguments.bf16, kernels, arguments.zero_stage)

    def padded(make: Callable[[], nn.Module]) -> Callable[[], Contender]:
        regions = arguments.max_regions or arguments.regions[1]
        return lambda: Padded(make(), examples, arguments.max_tokens, regions, device, arguments.bf16)

    found = {
        "ours": ours(choose_kernels("auto", device, dropout)),
        "ours, plain twins": ours(TWIN),
        "padded InterBERT": padded(lambda: PaddedInterBert(sizes)),
        "LXMERT": padded(lambda: Lxmert(sizes, values)),
        "VisualBERT": padded(lambda: VisualBert(sizes, values)),
    }
    wanted = [name.strip() for name in arguments.only.split(",")] if arguments.only else list(found)
    if unknown := [name for name in wanted if name not in found]:
        raise UsageError(f"--only {unknown[0]}: no such contender; there are {', '.join(found)}")
    return {name: found[name] for name in found if name in wanted}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of all contenders, printed as a table."""
    device = this_device()
    makers = contenders(arguments, device)
    memory = {name: in_a_process(peak_memory, arguments, name) for name in makers}
    start_processes()
    running = {name: make() for name, make in makers.items()}
    for contender in running.values():
        contender.step()  # buffers and choices of the first step
        contender.seconds = {name: [] for name in PARTS}
    rounds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(arguments.rounds):
        for name, contender in running.items():
            rounds[name].append(statistics.median(contender.step() for _ in range(arguments.steps)))
    return report(arguments, running, rounds, memory, peak_tflops(device, arguments.peak_tflops))


def report(
    arguments: argparse.Namespace,
    running: dict[str, Contender],
    rounds: dict[str, list[float]],
    memory: dict[str, float],
    peak: float | None,
) -> dict[str, Any]:
    """The figures, from the seconds of a step in each round."""
    first = next(iter(running.values()))
    examples = first.examples
    batch = pack(examples, examples[0].features.shape[1])
    tokens = len(batch.joint_order)
    result: dict[str, Any] = {"samples": len(examples), "tokens": tokens, "contenders": {}}
    for name, contender in running.items():
        seconds = statistics.median(rounds[name])
        ratios = [mine / base for mine, base in zip(rounds[name], rounds[next(iter(running))], strict=True)]
        parts = {part: statistics.median(values) for part, values in contender.seconds.items()}
        figures = {
            "samples_per_second": len(examples) / seconds,
            "real_tokens_per_second": tokens / seconds,
            "time_of_ours": statistics.median(ratios),
            "time_of_ours_range": [min(ratios), max(ratios)],
            "peak_memory_gib": memory[name],
            "parts": parts,
        }
        if isinstance(contender, Ours):
            figures["tflops"] = training_flops(contender.engine.model.config, batch) / seconds / 1e12
            figures["mfu"] = figures["tflops"] / peak if peak else None
            figures["parameters"] = parameters(contender.engine.model)
        else:
            figures["parameters"] = parameters(contender.model)
            figures["padded_tokens_per_second"] = len(examples) * (contender.tokens + contender.regions) / seconds
        result["contenders"][name] = figures
    head = ("", "parameters", "samples/s", "real tokens/s", "TFLOP/s", "times our time (range)", "memory GiB", *PARTS)
    rows = []
    for name, f in result["contenders"].items():
        low, high = f["time_of_ours_range"]
        rows.append(
            (
                name,
                f"{f['parameters'] / 1e6:.1f} M",
                f"{f['samples_per_second']:.2f}",
                f"{f['real_tokens_per_second']:.0f}",
                f"{f['tflops']:.3f}" if "tflops" in f else "",
                f"{f['time_of_ours']:.2f} ({low:.2f}-{high:.2f})",
                f"{f['peak_memory_gib']:.2f}",
                *(f"{1000 * f['parts'][part]:.0f} ms" for part in PARTS),
            )
        )
    print("\n".join(aligned([head, *rows])))
    return result


def peak_memory(arguments: argparse.Namespace, name: str) -> float:
    """GiB that three steps of a contender take beyond what its process had before, on the device or in the process."""
    device = this_device()
    start_processes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = resident("VmRSS")
    contender = contenders(arguments, device)[name]()
    for _ in range(3):
        contender.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """GiB: what /proc says of this process (VmRSS now, VmHWM at most so far)."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def in_a_process(function: Callable[..., float], *arguments: Any) -> float:
    """The result of a function in a fresh process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
