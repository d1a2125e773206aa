#!/usr/bin/env python3
"""Which layouts of a model fit the memory of a device, and with how many samples at a time.

    python tools/plan.py --model base --gpus 8 --gpu-memory 80
    python tools/plan.py --model large --gpus 64 --gpu-memory 40 --regions 10-100 --global-batch-size 4096

By arithmetic (megatron_interbert/training/memory.py), which tests hold to within 10 % of what torch's allocator counts on a CPU; on GPUs it
was not counted. A device also holds its driver's context and the allocator's leftovers: --reserve keeps room for them.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.command_line import finite_number
from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.files import check_output, json_text, write_output
from megatron_interbert.machines.processes import aligned
from megatron_interbert.model.presets import load_model_config
from megatron_interbert.parser import Parser
from megatron_interbert.training.memory import Layout, Load, Memory, largest_micro_batch, predict
from tools.benchmarks.batches import span

GIB = 2**30
MOST = 1 << 16  # samples at a time beyond which it is not asked


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text above as it stands, and the default of each flag."""


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model", default="base", help="preset or JSON file of model sizes")
    parser.add_argument("--gpus", type=int, default=8, help="devices in all")
    parser.add_argument("--gpu-memory", type=finite_number, default=80.0, help="GiB of one")
    parser.add_argument("--reserve", type=float, default=0.1, help="share of the memory to leave free")
    parser.add_argument("--words", type=span, default=(8, 20), help="tokens of a sample with [CLS] and [SEP], from-to")
    parser.add_argument("--regions", type=span, default=(36, 36), help="regions of a sample, from-to")
    parser.add_argument("--micro-batch-size", type=int, help="samples at a time; default: as many as fit")
    parser.add_argument("--global-batch-size", type=int, default=0, help="a micro-batch beyond its share of this is not asked for")
    parser.add_argument("--fp32", action="store_true", help="passes in 32 bits instead of 16")
    parser.add_argument(
        "--sequence-parallel", action="store_true", help="tensor-parallel ranks also share the tokens between layers"
    )
    parser.add_argument("--kernels", choices=("triton", "torch"), default="triton")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    for name in ("gpus", "gpu_memory", "micro_batch_size"):
        if getattr(arguments, name) is not None and not getattr(arguments, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected more than 0")
    if arguments.global_batch_size < 0:
        raise UsageError(f"--global-batch-size is {arguments.global_batch_size}, expected 0 or more")
    if arguments.output:
        check_output(arguments.output, "--output")
    if not 0 <= arguments.reserve < 1:
        raise UsageError(f"--reserve is {arguments.reserve}, expected a share of the memory from 0 up to 1, such as 0.1")
    sizes = load_model_config(arguments.model)
    if not (sizes.vocab_size and sizes.feature_dim and sizes.num_classes):
        raise UsageError(f"--model {arguments.model} takes sizes from its data; give a JSON file with all sizes, or base")
    rows = [row for layout in layouts(sizes, arguments) if (row := fit(sizes, layout, arguments))]
    if not rows:
        less = "fewer samples at a time" if arguments.micro_batch_size else "a smaller model"
        raise UsageError(f"nothing fits {arguments.gpus} devices of {arguments.gpu_memory:g} GiB; more of them, or {less}")
    print("\n".join(table(rows, arguments)))
    if arguments.output:
        found = [{**vars(row[0]), "micro_batch_size": row[1], **vars(row[2])} for row in rows]
        write_output(arguments.output, json_text({"layouts": found}), "--output")


def layouts(sizes: ModelConfig, arguments: argparse.Namespace) -> Iterator[Layout]:
    """All that divide the devices and the model evenly, the simplest first."""
    most = min(arguments.gpus, sizes.num_attention_heads)  # each rank has a head
    tensors = [size for size in range(1, most + 1) if arguments.gpus % size == 0]
    for recompute, tensor, stage in itertools.product((False, True), tensors, (0, 1, 2, 3)):
        data = arguments.gpus // tensor
        try:
            sizes.check_tensor_parallel(tensor)
        except UsageError:
            continue
        if (stage == 0 and not arguments.fp32) or (stage > 1 and data == 1) or arguments.global_batch_size % data:
            continue
        yield Layout(data, tensor, stage, not arguments.fp32, arguments.kernels == "triton", recompute, arguments.sequence_parallel)


def fit(sizes: ModelConfig, layout: Layout, arguments: argparse.Namespace) -> tuple[Layout, int, Memory] | None:
    """(Layout, samples at a time, memory), or None where not one sample fits, or not as many as are asked for."""
    (words, most_words), (regions, most_regions) = arguments.words, arguments.regions
    load = Load(1, (words + most_words) / 2, (regions + most_regions) / 2, most_words, most_regions)
    room = arguments.gpu_memory * GIB * (1 - arguments.reserve)
    most = arguments.global_batch_size // layout.data or MOST
    samples = arguments.micro_batch_size or largest_micro_batch(sizes, layout, load, room, most)
    if not samples:
        return None
    memory = predict(sizes, layout, Load(samples, load.words, load.regions, most_words, most_regions))
    return (layout, samples, memory) if memory.peak <= room else None


def table(rows: list[tuple[Layout, int, Memory]], arguments: argparse.Namespace) -> list[str]:
    """A line for each layout that fits."""
    head = (
        "data",
        "tensor",
        "ZeRO",
        "recompute",
        "micro-batch",
        "weights",
        "optimizer",
        "gradients",
        "buffers",
        "activations",
        "peak",
    )
    lines = [
        (
            *(layout.data, layout.tensor, layout.zero_stage, "yes" if layout.recompute else "no"),
            f"{samples}+" if samples == MOST else samples,
            *(
                f"{part / GIB:.2f}"
                for part in (memory.weights, memory.optimizer, memory.gradients, memory.buffers, memory.activations, memory.peak)
            ),
        )
        for layout, samples, memory in rows
    ]
    room = arguments.gpu_memory * (1 - arguments.reserve)
    bits = "32 bits" if arguments.fp32 else "16 bits (ZeRO 1 to 3)"
    how = ", sequence parallel where tensor is more than 1" if arguments.sequence_parallel else ""
    bits = "32 bits" if arguments.fp32 else "16 bits (ZeRO 1 to 3)"
    return [
        f"GiB of each of {arguments.gpus} devices, {room:g} of {arguments.gpu_memory:g} used at most",
        f"{bits}, {arguments.kernels} kernels{how}; {'-'.join(map(str, arguments.words))} words and"
        f" {'-'.join(map(str, arguments.regions))} regions a sample",
        *aligned([head, *lines]),
    ]


if __name__ == "__main__":
    run_entry(main, reports=True)
