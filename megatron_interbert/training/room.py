"""Refuse a run whose ranks cannot fit their memory, before anything is built."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from megatron_interbert.errors import UsageError, local_errors
from megatron_interbert.machines.host import free_memory, free_swap
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.planning.layout import Layout, Load
from megatron_interbert.planning.memory import predict
from megatron_interbert.planning.search import (
    GIB,
    Fit,
    Room,
    flags_of,
    nearby_fits,
    nearest_fit,
)
from megatron_interbert.training.deepspeed_config import read_deepspeed_config
from megatron_interbert.training.micro_batch import Trial, load_of, memory_of
from megatron_interbert.training.swap import SWAP_ROOM

ERROR = 0.15  # the prediction's: what is predicted to exceed the room by less may fit
MARGIN = 0.05  # a layout is said to fit if it leaves this share of the room free


def check_memory(trial: Trial) -> None:
    """Raise UsageError on all ranks if the micro-batch of one, of its first samples, is predicted
    to need more than there is; it names the layout nearest to this one that fits.

    Call it on all ranks.
    """
    state = trial.state
    with local_errors():
        load = load_of(trial.batch(trial.config.micro_batch_size))
    room = room_of(trial)
    memory = predict(trial.job.model_config, trial.layout, load)
    everywhere = state.gather((bool(possible(room).shortage(memory)), load, room))
    short = [rank for rank, (short_of, _, _) in enumerate(everywhere) if short_of]
    if not short:
        return

    # put into words by one rank: the others would take another time for it
    said = refusal(trial, short[0], *everywhere[short[0]][1:]) if state.is_main else ""
    raise UsageError(state.gather(said)[0])


def refusal(trial: Trial, rank: int, load: Load, room: Room) -> str:
    """Say what a rank lacks, and which layout would fit."""
    lacking = room.shortage(predict(trial.job.model_config, trial.layout, load))

    return (
        f"memory: rank {rank} needs {lacking} by prediction; {advice(trial, load, room)};"
        " interbert plan lists all that fit a device"
    )


def advice(trial: Trial, load: Load, room: Room) -> str:
    """Name the layout nearest to the run's that fits, or that may fit; with fewer ranks, if these
    share one machine; else say what the smallest of all lacks.
    """
    sizes = trial.job.model_config
    samples = trial.config.micro_batch_size
    half = has_bf16(trial)

    for words, layout, there in alternatives(trial.layout, room):
        more = trial.config.global_batch_size > samples * layout.data
        layout = replace(layout, accumulates=layout.accumulates or more)
        found = nearest_fit(sizes, layout, load, there, samples, half)
        if found:
            needed = f"{there.needed(found.memory) / GIB:.1f} GiB"
            if found.memory.disk:
                ranks = min(read_launch().local_size, layout.data * layout.tensor)
                disk = found.memory.disk * SWAP_ROOM * ranks
                needed += f", and {disk / 1e9:.1f} GB of disk on each machine"
            return f"{words}: {changes(trial, found)} ({needed})"

    others = nearby_fits(sizes, trial.layout, load, samples, half)
    smallest = min(others, key=lambda one: room.filled(one.memory))
    lacking = room.shortage(smallest.memory)

    return (
        f"no layout of these ranks fits: {changes(trial, smallest)} needs {lacking}; use more"
        " devices, or a smaller model"
    )


def alternatives(layout: Layout, room: Room) -> Iterator[tuple[str, Layout, Room]]:
    """Yield (how to call what fits, a layout to start from, the room of its ranks): with the ranks
    of a run, and with fewer, if they share one machine and each can take more of it.
    """
    yield "the nearest layout that fits", layout, times(room, 1 - MARGIN)
    yield "the nearest layout that may fit", layout, possible(room)

    launch = read_launch()
    ranks = layout.data * layout.tensor
    if launch.local_size != ranks:
        return

    for fewer in (n for n in range(ranks - 1, 0, -1) if ranks % n == 0 and n % layout.tensor == 0):
        more = ranks / fewer
        device = room.device * more if room.one_memory else room.device
        there = times(replace(room, device=device, host=room.host * more), 1 - MARGIN)
        few = f"{fewer} rank{'s' * (fewer > 1)} instead of {ranks} fit{'s' * (fewer == 1)} with"
        data = fewer // layout.tensor
        expert = math.gcd(layout.expert, fewer)
        secondary = min(layout.secondary, data)
        yield few, replace(layout, data=data, expert=expert, secondary=secondary), there


def has_bf16(trial: Trial) -> bool:
    """Check whether a run could compute in bfloat16: its device can, and its JSON does not forbid
    it.
    """
    block = read_deepspeed_config(trial.config).get("bf16") or {}
    on_cpu = trial.device.type == "cpu"
    possible_here = on_cpu or torch.cuda.is_bf16_supported(including_emulation=False)

    return possible_here and block.get("enabled", "auto") in ("auto", True)


def possible(room: Room) -> Room:
    """Return the most that a rank may be predicted to need where the prediction may be wrong."""
    return times(room, 1 + ERROR)


def times(room: Room, factor: float) -> Room:
    """Return a room of `factor` times the memory."""
    return replace(room, device=room.device * factor, host=room.host * factor)


def changes(trial: Trial, found: Fit) -> str:
    """Return what a user changes of a run's flags and DeepSpeed JSON for a layout."""
    config = trial.config
    samples = config.micro_batch_size
    flags = " ".join(flags_of(found, trial.layout, samples, config.given))
    by_file = config.deepspeed_config
    settings = read_deepspeed_config(config)
    other_steps = found.samples != samples or found.layout.data != trial.layout.data

    if other_steps and "global_batch_size" not in config.given:
        flags += f" --global-batch-size {config.global_batch_size}"
    if by_file and ("--zero-stage" in flags or "--deepspeed-config" in flags):
        flags += f" instead of --deepspeed-config {by_file}"
    else:
        left_out = []
        if other_steps and settings.get("gradient_accumulation_steps", "auto") != "auto":
            left_out.append("gradient_accumulation_steps")
        if trial.layout.secondary and not found.layout.secondary:
            left_out.append("zero_hpz_partition_size")
        if left_out:
            flags += f" without {' and '.join(left_out)} in {by_file}"

    return flags.strip() or "the same flags"


def room_of(trial: Trial, disk: float = math.inf) -> Room:
    """Return what this rank may take of its device, of its machine's memory and of a disk. What a
    run's swap files need is checked where they are made.
    """
    ranks = read_launch().local_size
    device = memory_of(trial.device)
    one_memory = trial.device.type != "cuda"
    if one_memory:
        device += free_swap() / ranks

    return Room(device, free_memory() / ranks, disk, one_memory)
