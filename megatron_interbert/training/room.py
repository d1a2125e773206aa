"""Refuse a run whose ranks cannot fit their memory, before anything is built."""

from dataclasses import replace

from megatron_interbert.errors import UsageError, local_errors
from megatron_interbert.machines.host import free_memory, free_swap
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.planning.layout import Load
from megatron_interbert.planning.memory import predict
from megatron_interbert.planning.search import GIB, Room, flags_of, nearest_fit
from megatron_interbert.training.micro_batch import Trial, load_of, memory_of

ERROR = 0.15  # the prediction's: what is predicted to exceed the room by less may fit


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
    possible = replace(room, device=room.device * (1 + ERROR), host=room.host * (1 + ERROR))
    everywhere = state.gather((bool(possible.shortage(memory)), load, room))
    short = [rank for rank, (short_of, _, _) in enumerate(everywhere) if short_of]
    if not short:
        return

    # put into words by one rank: the others would take another time for it
    said = refusal(trial, short[0], *everywhere[short[0]][1:]) if state.is_main else ""
    raise UsageError(state.gather(said)[0])


def refusal(trial: Trial, rank: int, load: Load, room: Room) -> str:
    """Say what a rank lacks, and which layout would fit."""
    sizes = trial.job.model_config
    lacking = room.shortage(predict(sizes, trial.layout, load))
    config = trial.config
    samples = config.micro_batch_size
    found = nearest_fit(sizes, trial.layout, load, room, samples)
    advice = "no layout of these ranks fits: use more of them, or a smaller model"

    if found:
        flags = " ".join(flags_of(found, trial.layout, samples, config.given))
        if found.samples != samples and "global_batch_size" not in config.given:
            flags += f" --global-batch-size {config.global_batch_size}"
        if config.deepspeed_config and ("--zero-stage" in flags or "--deepspeed-config" in flags):
            flags += f" instead of --deepspeed-config {config.deepspeed_config}"
        needed = found.memory.together if room.one_memory else found.memory.peak
        advice = f"the nearest layout that fits: {flags} ({needed / GIB:.1f} GiB)"

    return (
        f"memory: rank {rank} needs {lacking} GiB by prediction; {advice}; interbert plan lists"
        " all that fit a device"
    )


def room_of(trial: Trial) -> Room:
    """Return what this rank may take of its device and of its machine's memory. What swap files
    need of a disk is checked where they are made.
    """
    ranks = read_launch().local_size
    device = memory_of(trial.device)
    one_memory = trial.device.type != "cuda"
    if one_memory:
        device += free_swap() / ranks

    return Room(device, free_memory() / ranks, float("inf"), one_memory)
