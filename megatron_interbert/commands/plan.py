"""List the layouts of a model that fit the memory of a device, with their largest micro-batch.

    interbert plan --model base --gpus 8 --gpu-memory 80
    interbert plan --model large --gpus 64 --gpu-memory 40 --regions 10-100 --global-batch-size 4096
    interbert plan --model m6-10b-dense --gpus 512 --device h100 --global-batch-size 8192

Memory is computed by planning/memory.py, which tests hold to within 10 % of what torch's allocator
counts on a CPU; on GPUs it has not been compared. A device also holds its driver's context and the
allocator's fragments: --reserve leaves room for them. With --device, layouts are sorted by
predicted samples/s (planning/timing.py); what that assumes is printed, and on GPUs it has not been
compared either.
"""

import dataclasses
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
from megatron_interbert.planning.layout import Layout, Load
from megatron_interbert.planning.memory import Memory, largest_micro_batch, predict
from megatron_interbert.planning.timing import MACHINES, Machine, StepTime, step_time
from megatron_interbert.planning.traffic import expected_tokens

GIB = 2**30
MOST = 1 << 16  # largest micro-batch that is tried
TIME = ("compute", "tensor", "data", "update")
MEMORY = ("weights", "optimizer", "gradients", "buffers", "activations", "peak")


@dataclass
class Options(Flags):
    """Hold the flags of plan: a model, its samples and the devices."""

    GROUP: ClassVar[str] = "model"

    model: str = option("base", "preset or JSON file of model sizes")
    words: tuple[int, int] = option(
        (8, 20), "tokens per sample with [CLS] and [SEP], from-to; default: 8-20", read=span
    )
    regions: tuple[int, int] = option(
        (36, 36), "regions per sample, from-to; default: 36", read=span
    )
    micro_batch_size: int = option(
        0,
        "samples per forward pass; default: as many as fit",
        group="optimisation",
    )
    global_batch_size: int = option(
        0,
        "samples per step; limits the micro-batch to a rank's share; 0: no limit",
        least=0,
        group="optimisation",
    )
    gpus: int = option(8, "devices in all", least=ABOVE_0, group="parallelism")
    gpu_memory: float = option(
        80.0, "GiB per device; default: that of --device", least=ABOVE_0, group="parallelism"
    )
    device: str = option(
        "", "device by name, to predict speed too", ("", *MACHINES), group="machine"
    )
    gpus_per_node: int = option(8, "devices of a node", least=1, group="machine")
    efficiency: float = option(
        0.45,
        "share of the device's peak that matrix products reach",
        least=ABOVE_0,
        most=1,
        group="machine",
    )
    link_bandwidth: float = option(
        0.0, "GB/s between devices of a node; default: that of --device", least=0, group="machine"
    )
    network_bandwidth: float = option(
        0.0,
        "GB/s of each device's share of the network; default: that of --device",
        least=0,
        group="machine",
    )
    overlap: float = option(
        0.0,
        "share of ZeRO's communication that the backward pass hides",
        least=0,
        most=1,
        group="machine",
    )
    reserve: float = option(0.1, "share of the memory to leave free", group="parallelism")
    fp32: bool = option(False, "compute in 32 bits instead of 16", group="parallelism")
    sequence_parallel: bool = option(
        False,
        "tensor-parallel ranks also split the tokens between layers",
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

    def machine(self) -> Machine | None:
        """Return the device with what flags change of it; None without --device."""
        if not self.device:
            return None

        found = MACHINES[self.device]

        return dataclasses.replace(
            found,
            per_node=self.gpus_per_node,
            efficiency=self.efficiency,
            overlap=self.overlap,
            link_gb_s=self.link_bandwidth or found.link_gb_s,
            network_gb_s=self.network_bandwidth or found.network_gb_s,
        )


@dataclass(frozen=True)
class Row:
    """Hold a layout that fits, with its micro-batch, the memory it takes on a device, and, if the
    device is known, the time of a step and the samples/s of all devices.
    """

    layout: Layout
    samples: int
    memory: Memory
    time: StepTime | None = None
    rate: float = 0.0


def layouts(sizes: ModelConfig, options: Options) -> Iterator[Layout]:
    """Yield all layouts that divide the devices and the model evenly, the simplest first."""
    most = min(options.gpus, sizes.num_attention_heads)  # each rank needs a head
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
    """Return the layout with its micro-batch and memory; None if it does not fit a device."""
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
    if options.global_batch_size and not options.micro_batch_size:  # it must divide the share
        samples = max(n for n in range(1, samples + 1) if most % n == 0)

    load = Load(samples, mean_words, mean_regions, most_words, most_regions)
    memory = predict(sizes, layout, load)
    if memory.peak > room:
        return None

    machine = options.machine()
    if machine is None:
        return Row(layout, samples, memory)

    steps = max(1, most // samples) if options.global_batch_size else 1
    time = step_time(sizes, layout, [expected_tokens(load)] * steps, machine)

    return Row(layout, samples, memory, time, samples * steps * layout.data / time.total)


def table(rows: list[Row], options: Options) -> list[str]:
    """Return the lines of the table: a heading, then one for each layout that fits."""
    head = ("data", "tensor", "ZeRO", "recompute", "micro-batch", *MEMORY)
    if options.device:
        head = (*head, "samples/s", *TIME)
    lines = []

    for row in rows:
        layout = row.layout
        samples = f"{row.samples}+" if row.samples == MOST else row.samples
        cells = [f"{getattr(row.memory, name) / GIB:.2f}" for name in MEMORY]
        recompute = "yes" if layout.recompute else "no"
        if row.time:
            parts = (f"{getattr(row.time, name):.3f}" for name in TIME)
            cells += [f"{row.rate:.1f}", *parts]
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
        *assumptions(options),
        *aligned([head, *lines]),
    ]


def assumptions(options: Options) -> list[str]:
    """Return lines on what the predicted times rest on."""
    machine = options.machine()
    if machine is None:
        return []

    return [
        (
            f"seconds of a step on {options.device}: products at {machine.efficiency:g} of"
            f" {machine.tflops:g} TFLOP/s; {machine.link_gb_s:g} GB/s between {machine.per_node}"
            f" devices of a node, {machine.network_gb_s:g} between nodes;"
            f" {100 * machine.overlap:g} % of ZeRO's communication hidden. Not measured on GPUs"
        )
    ]


def run(options: Options) -> None:
    """Print the table of what fits."""
    if options.output:
        check_output(Path(options.output), "--output")

    sizes = load_model_config(options.model)
    if not (sizes.vocab_size and sizes.feature_dim and sizes.num_classes):
        raise UsageError(
            f"--model {options.model} takes sizes from its data; give base, or a JSON file"
            " with all sizes"
        )

    if options.device and "gpu_memory" not in options.given:
        options.gpu_memory = MACHINES[options.device].memory_gib
    rows = [row for layout in layouts(sizes, options) if (row := fit(sizes, layout, options))]
    rows.sort(key=lambda row: -row.rate)  # stable: without a device the order stays
    if not rows:
        less = "fewer samples at a time" if options.micro_batch_size else "a smaller model"
        raise UsageError(
            f"nothing fits {options.gpus} devices of {options.gpu_memory:g} GiB; try more of them"
            f" or {less}"
        )

    print("\n".join(table(rows, options)))
    if options.output:
        found = [as_record(row) for row in rows]
        write_output(Path(options.output), json_text({"layouts": found}), "--output")


def as_record(row: Row) -> dict[str, Any]:
    """Return a row as a JSON object, memory in bytes."""
    speed = {"samples_per_second": row.rate, "seconds": vars(row.time)} if row.time else {}
    return {**vars(row.layout), "micro_batch_size": row.samples, **vars(row.memory), **speed}


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run, reports=True)
