"""Which layouts of a model fit the memory of a device, and with how many samples at a time.

    interbert plan --model base --gpus 8 --gpu-memory 80
    interbert plan --model large --gpus 64 --gpu-memory 40 --regions 10-100 --global-batch-size 4096

By arithmetic (training/memory.py), which tests hold to within 10 % of what torch's allocator counts
on a CPU; on GPUs it was not counted. A device also holds its driver's context and the allocator's
leftovers: --reserve keeps room for them.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_interbert.command_line import run_command, span
from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.options import ABOVE_0, Flags, option
from megatron_interbert.errors import UsageError
from megatron_interbert.files import check_output, json_text, write_output
from megatron_interbert.machines.processes import aligned
from megatron_interbert.model.presets import load_model_config
from megatron_interbert.training.memory import Layout, Load, Memory, largest_micro_batch, predict

GIB = 2**30
MOST = 1 << 16  # samples at a time beyond which it is not asked
MEMORY = ("weights", "optimizer", "gradients", "buffers", "activations", "peak")


@dataclass
class Options(Flags):
    """A model, its samples, and the devices that there are."""

    GROUP: ClassVar[str] = "model"

    model: str = option("base", "preset or JSON file of model sizes")
    words: tuple[int, int] = option(
        (8, 20), "tokens of a sample with [CLS] and [SEP], from-to; default: 8-20", read=span
    )
    regions: tuple[int, int] = option(
        (36, 36), "regions of a sample, from-to; default: 36", read=span
    )
    micro_batch_size: int = option(
        0,
        "samples at a time; default: as many as fit",
        group="optimisation",
    )
    global_batch_size: int = option(
        0,
        "a micro-batch beyond its share of this is not asked for; 0: any",
        least=0,
        group="optimisation",
    )
    gpus: int = option(8, "devices in all", least=ABOVE_0, group="parallelism")
    gpu_memory: float = option(80.0, "GiB of one", least=ABOVE_0, group="parallelism")
    reserve: float = option(0.1, "share of the memory to leave free", group="parallelism")
    fp32: bool = option(False, "passes in 32 bits instead of 16", group="parallelism")
    sequence_parallel: bool = option(
        False,
        "tensor-parallel ranks also share the tokens between layers",
        group="parallelism",
    )
    kernels: str = option("triton", "fused kernels", ("triton", "torch"), group="parallelism")
    output: str = option("", "JSON file for the figures", group="logging")

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()
        if "micro_batch_size" in self.given and self.micro_batch_size < 1:
            raise UsageError(f"--micro-batch-size is {self.micro_batch_size}, expected more than 0")
        if not 0 <= self.reserve < 1:
            raise UsageError(
                f"--reserve is {self.reserve}, expected a share of the memory from 0 up to 1, such"
                " as 0.1"
            )


@dataclass(frozen=True)
class Row:
    """A layout that fits, with its micro-batch and the memory of a device."""

    layout: Layout
    samples: int
    memory: Memory


def layouts(sizes: ModelConfig, options: Options) -> Iterator[Layout]:
    """List all layouts that divide the devices and the model evenly, the simplest first."""
    most = min(options.gpus, sizes.num_attention_heads)  # each rank has a head
    tensors = [size for size in range(1, most + 1) if options.gpus % size == 0]
    for recompute, tensor, stage in itertools.product((False, True), tensors, (0, 1, 2, 3)):
        data = options.gpus // tensor
        try:
            sizes.check_tensor_parallel(tensor)
        except UsageError:
            continue

        if (stage == 0 and not options.fp32) or (stage > 1 and data == 1):
            continue
        if options.global_batch_size % data:
            continue

        yield Layout(
            data,
            tensor,
            stage,
            not options.fp32,
            options.kernels == "triton",
            recompute,
            options.sequence_parallel,
        )


def fit(sizes: ModelConfig, layout: Layout, options: Options) -> Row | None:
    """Find the samples at a time; None where not one fits, or not as many as are asked for."""
    words, most_words = options.words
    regions, most_regions = options.regions
    mean_words = (words + most_words) / 2
    mean_regions = (regions + most_regions) / 2
    one = Load(1, mean_words, mean_regions, most_words, most_regions)

    room = options.gpu_memory * GIB * (1 - options.reserve)
    most = options.global_batch_size // layout.data or MOST
    samples = options.micro_batch_size or largest_micro_batch(sizes, layout, one, room, most)
    if not samples:
        return None

    load = Load(samples, mean_words, mean_regions, most_words, most_regions)
    memory = predict(sizes, layout, load)

    return Row(layout, samples, memory) if memory.peak <= room else None


def table(rows: list[Row], options: Options) -> list[str]:
    """Give a line for each layout that fits, under a heading."""
    head = ("data", "tensor", "ZeRO", "recompute", "micro-batch", *MEMORY)
    lines = []

    for row in rows:
        layout = row.layout
        samples = f"{row.samples}+" if row.samples == MOST else row.samples
        cells = [f"{getattr(row.memory, name) / GIB:.2f}" for name in MEMORY]
        recompute = "yes" if layout.recompute else "no"
        lines.append((layout.data, layout.tensor, layout.zero_stage, recompute, samples, *cells))

    room = options.gpu_memory * (1 - options.reserve)
    bits = "32 bits" if options.fp32 else "16 bits (ZeRO 1 to 3)"
    how = ", sequence parallel where tensor is more than 1" if options.sequence_parallel else ""

    return [
        f"GiB of each of {options.gpus} devices, {room:g} of {options.gpu_memory:g} used at most",
        (
            f"{bits}, {options.kernels} kernels{how}; {'-'.join(map(str, options.words))} words and"
            f" {'-'.join(map(str, options.regions))} regions a sample"
        ),
        *aligned([head, *lines]),
    ]


def run(options: Options) -> None:
    """Print the table of what fits."""
    if options.output:
        check_output(Path(options.output), "--output")

    sizes = load_model_config(options.model)
    if not (sizes.vocab_size and sizes.feature_dim and sizes.num_classes):
        raise UsageError(
            f"--model {options.model} takes sizes from its data; give a JSON file with all sizes,"
            " or base"
        )

    rows = [row for layout in layouts(sizes, options) if (row := fit(sizes, layout, options))]
    if not rows:
        less = "fewer samples at a time" if options.micro_batch_size else "a smaller model"
        raise UsageError(
            f"nothing fits {options.gpus} devices of {options.gpu_memory:g} GiB; more of them, or"
            f" {less}"
        )

    print("\n".join(table(rows, options)))
    if options.output:
        found = [as_record(row) for row in rows]
        write_output(Path(options.output), json_text({"layouts": found}), "--output")


def as_record(row: Row) -> dict[str, Any]:
    """Give a row as JSON."""
    return {**vars(row.layout), "micro_batch_size": row.samples, **vars(row.memory)}


def main() -> None:
    """Entry point."""
    run_command(Options, __doc__, run, reports=True)
