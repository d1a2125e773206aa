"""List the layouts of a model that fit the memory of a device, and why the others do not.

    interbert plan --model base --gpus 8 --gpu-memory 80
    interbert plan --model large --gpus 64 --gpu-memory 40 --regions 10-100 --global-batch-size 4096
    interbert plan --model m6-10b-dense --gpus 512 --device h100 --global-batch-size 8192
    interbert plan --model m6-10b-dense --gpus 8 --device h100 --host-memory 1000 --search recipe

Memory is computed by planning/memory.py, which tests hold to within 10 % of what torch's allocator
counts on a CPU; on GPUs it has not been compared. A device also holds its driver's context and the
allocator's fragments: --reserve leaves room for them. With --device, layouts are sorted by
predicted samples/s (planning/timing.py); what that assumes is printed, and on GPUs it has not been
compared either. --search also tries sequence parallelism, and writes the best layout as files for
`interbert pretrain --config`.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_interbert.command_line import run_command
from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.files import check_output, json_text, write_output
from megatron_interbert.model.presets import check_words
from megatron_interbert.planning.layout import ON_DISK, Layout, rank_parameters
from megatron_interbert.planning.options import Options
from megatron_interbert.planning.recipe import write_recipe
from megatron_interbert.planning.search import Fit, fit, layouts, refused_tensors
from megatron_interbert.planning.table import Row, fitting, layout_name, leaving_out, wrapped
from megatron_interbert.planning.timing import MACHINES, step_time
from megatron_interbert.planning.traffic import expected_tokens

MOST_DEVICES = 1 << 16  # that are tried for a model that does not fit those given


def candidates(sizes: ModelConfig, options: Options) -> Iterator[Layout]:
    """Yield the layouts to compare: with offload only if there is something to offload to, with and
    without split rows only in a search.
    """
    like = Layout(half=not options.fp32, fused=options.kernels == "triton")

    for layout in layouts(sizes, like, options.gpus):
        split = options.sequence_parallel and layout.tensor > 1
        if not options.search and layout.sequence_parallel != split:
            continue

        on_disk = ON_DISK in (layout.optimizer_on, layout.parameters_on)
        if (options.host_memory or not layout.offloads) and (options.nvme_space or not on_disk):
            yield layout


def with_time(sizes: ModelConfig, found: Fit, options: Options) -> Row:
    """Return a row of the table."""
    machine = options.machine()
    if machine is None:
        return Row(found)

    load = dataclasses.replace(options.batches().sample, samples=found.samples)
    time = step_time(sizes, found.layout, [expected_tokens(load)] * found.steps, machine)

    return Row(found, time, found.samples * found.steps * found.layout.data / time.total)


def report(
    sizes: ModelConfig, rows: list[Row], left_out: list[tuple[Layout, str]], options: Options
) -> list[str]:
    """Return the lines of the report: what is planned for what, what fits, and what does not."""
    room = options.gpu_memory * (1 - options.reserve)
    devices = in_words(options.gpus)
    bits = "32 bits" if options.fp32 else "16 bits"
    batch = ""
    if options.global_batch_size:
        batch = f", {options.global_batch_size} in a step"
    found = wrapped(
        f"{readable_count(rank_parameters(sizes, 1))} parameters on {devices} of"
        f" {options.gpu_memory:g} GiB, of which {room:g} are used at most (--reserve)"
    )
    found += wrapped(
        f"samples of {as_flag(options.words)} words and {as_flag(options.regions)} regions{batch};"
        f" {bits}, {options.kernels} kernels"
    )
    found += assumptions(options)

    if rows:
        if options.gpus > 1:
            found += wrapped(least_devices(sizes, options))
        limited = bool(options.micro_batch_size or options.global_batch_size)
        found += fitting(rows, limited)
    if left_out:
        found += leaving_out(left_out)

    return found


def readable_count(parameters: int) -> str:
    """Return a number of parameters for a message, such as `157.1 M` or `10.24 B`."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def least_devices(sizes: ModelConfig, options: Options) -> str:
    """Say how many devices a step needs at least."""
    samples = options.micro_batch_size or 1
    found = fewest(sizes, options, options.gpus)
    if not found:
        return ""

    count, layout = found
    plural = "s" if samples > 1 else ""
    return (
        f"fewest devices, of 1, 2, 4, .., for {samples} sample{plural} at a time: {count}"
        f" ({layout_name(layout)})"
    )


def fewest(sizes: ModelConfig, options: Options, most: int) -> tuple[int, Layout] | None:
    """Return the smallest power of 2 devices, up to `most`, that hold a micro-batch of one sample
    (or of --micro-batch-size), and the simplest layout in which they do; None if there is none.
    """
    batches = dataclasses.replace(options.batches(), micro_batch=options.micro_batch_size or 1)
    counts = (1 << power for power in range(most.bit_length()))

    for count in counts:
        fewer = dataclasses.replace(options, gpus=count)
        for layout in candidates(sizes, fewer):
            if isinstance(fit(sizes, layout, batches, fewer.room()), Fit):
                return count, layout

    return None


def in_words(devices: int) -> str:
    """Return a number of devices in words."""
    return f"{devices} device{'s' * (devices != 1)}"


def as_flag(span: tuple[int, int]) -> str:
    """Return a span as its flag is written."""
    low, high = span
    return f"{low}" if low == high else f"{low}-{high}"


def assumptions(options: Options) -> list[str]:
    """Return lines on what the predicted times rest on."""
    machine = options.machine()
    if machine is None:
        return []

    said = (
        f"times are predicted for {options.device}, and were not measured on GPUs: products at"
        f" {machine.efficiency:g} of {machine.tflops:g} TFLOP/s; {machine.link_gb_s:g} GB/s between"
        f" {machine.per_node} devices of a node, {machine.network_gb_s:g} between nodes;"
        f" {100 * machine.overlap:g} % of ZeRO's communication hidden"
    )
    if options.host_memory:
        said += (
            f"; {machine.host_link_gb_s:g} GB/s to the host, updates there at {machine.host_gb_s:g}"
            f" GB/s, {machine.disk_gb_s:g} to its disk"
        )
    lines = wrapped(said)

    if options.gpus > machine.per_node and options.gpus % machine.per_node:
        lines += wrapped(
            f"note: {options.gpus} devices do not fill nodes of {machine.per_node}"
            " (--gpus-per-node); links are predicted as those of full nodes"
        )

    return lines


def run(options: Options) -> None:
    """Print the table of what fits."""
    if options.output:
        check_output(Path(options.output), "--output")

    sizes, note = options.sizes()
    check_words(sizes, options.words[1])
    if note:
        print(note)

    if options.device and "gpu_memory" not in options.given:
        options.gpu_memory = MACHINES[options.device].memory_gib

    rows = []
    left_out = []
    for layout in candidates(sizes, options):
        found = fit(sizes, layout, options.batches(), options.room())
        if isinstance(found, Fit):
            rows.append(with_time(sizes, found, options))
        else:
            left_out.append((layout, found))

    rows.sort(key=lambda row: -row.rate)  # stable: without --device the order stays
    print("\n".join(report(sizes, rows, left_out, options)))
    for tensor, reason in refused_tensors(sizes, options.gpus):
        print(f"TP {tensor}: {reason}")
    if not rows:
        sys.stdout.flush()
        raise UsageError(nothing_fits(sizes, options, [layout for layout, _ in left_out]))

    if options.search:
        folder = Path(options.search)
        best = rows[0].fit
        per_node = options.gpus_per_node
        model = {"model": options.model, **options.changes_of_model()}
        told = write_recipe(folder, model, best, options.gpu_memory, per_node)
        print(*told, sep="\n")
        if not (options.global_batch_size or options.micro_batch_size):
            samples = best.samples * best.steps * best.layout.data
            print(
                f"note: a step takes {samples} samples, as many as fit at a time; set how many your"
                " training needs with --global-batch-size"
            )
    if options.output:
        found = [as_record(row) for row in rows]
        write_output(Path(options.output), json_text({"layouts": found}), "--output")


def nothing_fits(sizes: ModelConfig, options: Options, tried: list[Layout]) -> str:
    """Say that no layout fits, and what is missing."""
    batches = options.batches()
    undivided = [batches.undivided(layout) for layout in tried]
    if undivided and all(undivided):
        return f"no layout of {in_words(options.gpus)} can share the batch: {undivided[0]}"

    ways = ["more of them"]
    if more := fewest(sizes, options, MOST_DEVICES):
        count, layout = more
        ways = [f"{in_words(count)} ({layout_name(layout)})"]
    ways.append("fewer samples at a time" if options.micro_batch_size else "a smaller model")
    if options.host_memory:
        disk = "more --nvme-space" if options.nvme_space else "offload to a disk (--nvme-space)"
        ways += ["more --host-memory", disk]
    else:
        ways.append("offload (--host-memory)")

    return (
        f"nothing fits {in_words(options.gpus)} of {options.gpu_memory:g} GiB; try"
        f" {', '.join(ways[:-1])}, or {ways[-1]}"
    )


def as_record(row: Row) -> dict[str, Any]:
    """Return a row as a JSON object, memory in bytes."""
    speed = {"samples_per_second": row.rate, "seconds": vars(row.time)} if row.time else {}
    found = row.fit
    return {**vars(found.layout), "micro_batch_size": found.samples, **vars(found.memory), **speed}


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run, reports=True)
