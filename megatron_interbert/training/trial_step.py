"""Try a step of a run on one process, for preflight, and predict the memory of the run's ranks."""

import copy
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.errors import UsageError, at_end
from megatron_interbert.files import write_json
from megatron_interbert.machines.host import same_bits_every_time
from megatron_interbert.machines.processes import start_processes
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.planning.memory import Memory, predict
from megatron_interbert.planning.search import GIB, Room
from megatron_interbert.tasks.pretraining.job import pretraining_job
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.deepspeed_config import (
    blocks_on_disk,
    merge,
    read_deepspeed_config,
)
from megatron_interbert.training.engine import Engine, engine_settings
from megatron_interbert.training.micro_batch import Trial, layout_of, load_of
from megatron_interbert.training.model_plan import build_engine, plan_model
from megatron_interbert.training.optimizer import elements, learning_rate
from megatron_interbert.training.room import advice, room_of
from megatron_interbert.training.run import random_streams
from megatron_interbert.training.swap import SWAP_ROOM, check_folder, prepare_swap


def try_step(config: RunConfig, ranks: int) -> str:
    """Try one training step of a run on `ranks` data-parallel ranks on one process, with its data,
    kernels, precision and optimizer.

    Communication between ranks and DeepSpeed's update of sharded weights are not tried. Returns a
    summary.
    """
    if config.deterministic:
        same_bits_every_time()

    device = start_processes()
    state = ParallelState()
    alone = config_of_one_process(config)
    job = pretraining_job(alone, state)
    plan = plan_model(alone, job, state, device)
    streams = random_streams(alone, state, device)
    kernels = plan.kernels
    trial = Trial(alone, job, state, device, kernels)
    memory = memory_of_run(config, ranks, trial)
    samples, lacking = samples_for_one_process(trial)
    if not samples:
        return f"not tried: one process, which holds the whole model, needs {lacking}; {memory}"

    names = plan.without_memory()
    settings = engine_settings(alone, state, names)
    settings = prepare_swap(settings, elements(names.parameters()), ranks=1)
    engine = build_engine(plan, alone, streams, device, plan.first_weights, settings)
    streams.start_step(1)
    figures, norm = one_step(engine, job, trial.batch(samples), alone, device)

    losses = ", ".join(f"{name} {figures[f'{name}_loss']:.3f}" for name in config.objective_names())
    notes = [f"losses {losses}", f"gradient norm {norm:.2f}"]
    if samples < config.micro_batch_size:
        notes.append(f"{samples} of {config.micro_batch_size} samples: it holds the whole model")
    if device.type == "cuda":
        seen = torch.cuda.max_memory_allocated(device) / GIB
        notes.append(f"peak {seen:.2f} GiB in this one-process step")

    return "; ".join([*notes, memory, f"kernels: {kernels.describe()}"])


def one_step(
    engine: Engine, job: Job, batch: PackedBatch, config: RunConfig, device: torch.device
) -> tuple[dict[str, float], float]:
    """Train on one batch; return its metrics and gradient norm.

    Raises UsageError if loss or gradients are not finite.
    """
    totals = job.task.count_targets(batch).to(device)
    batch = batch.to(device)
    loss, report = job.task.loss(engine.forward(batch), batch, totals)
    engine.backward(loss, last=True)
    norm, applied = engine.step(learning_rate(1, config))

    # fp16 may skip the first step: it is still finding its loss scale
    if not torch.isfinite(loss) or not (applied or config.fp16):
        raise UsageError(
            f"the first step is not finite (loss {loss.item()}, gradient norm {norm}); check the"
            " data with --strict-boxes, lower --lr or use --bf16"
        )

    return job.task.metrics(report, 1), norm


def config_of_one_process(config: RunConfig) -> RunConfig:
    """Return the configuration of the same run on one process: whole layers with all experts, one
    micro-batch a step.
    """
    alone = copy.copy(config)
    alone.tensor_model_parallel_size = 1
    alone.expert_parallel_size = 1
    alone.sequence_parallel = False
    alone.global_batch_size = 0

    if config.deepspeed_config:  # without its batch sizes, which are those of all ranks
        settings = read_deepspeed_config(config)
        for name in ("train_batch_size", "gradient_accumulation_steps"):
            settings.pop(name, None)
        folder = Path(tempfile.mkdtemp(prefix="interbert-preflight-"))
        at_end(lambda: shutil.rmtree(folder, ignore_errors=True))
        alone.deepspeed_config = str(folder / "deepspeed.json")
        write_json(Path(alone.deepspeed_config), settings)

    return alone


def samples_for_one_process(trial: Trial) -> tuple[int, str]:
    """Return (how many samples of a micro-batch fit one process that holds the whole model, what
    the first number that was tried lacks).
    """
    paths = {block["nvme_path"] for block in blocks_on_disk(merge(trial.config, 1)).values()}
    room = room_of(trial, min(map(free_space, paths), default=math.inf))
    samples = trial.config.micro_batch_size
    lacking = ""

    while samples:
        memory = predict(trial.job.model_config, trial.layout, load_of(trial.batch(samples)))
        if not (short_of := room.shortage(memory)):
            break
        lacking = lacking or short_of
        samples //= 2

    return samples, lacking


def memory_of_run(config: RunConfig, ranks: int, trial: Trial) -> str:
    """Describe the peak memory predicted for a rank of the run.

    Raises UsageError, with the nearest layout that fits, if the GPU, or without one this machine,
    has less.
    """
    run = copy.copy(trial)
    run.config = config
    run.layout = layout_of(config, ranks, trial.kernels)
    load = load_of(trial.batch(config.micro_batch_size))
    memory = predict(trial.job.model_config, run.layout, load)
    room = whole_room(trial)
    if lacking := room.shortage(memory):
        elsewhere = "; for GPUs elsewhere, rehearse it by interbert dry-run"
        raise UsageError(
            f"a rank needs {lacking} by prediction; {advice(run, load, room)}"
            f"{elsewhere * room.one_memory}"
        )

    check_swap_disk(merge(config, ranks), memory)
    what = "this machine has for all of its ranks" if room.one_memory else "the GPU has"
    said = f"{room.needed(memory) / GIB:.2f} GiB predicted per rank"
    if memory.host and not room.one_memory:
        said += f", and {memory.host / GIB:.2f} GiB of its host"
    if memory.disk:
        said += f", and {memory.disk / 1e9:.1f} GB of its disk"

    return f"{said}; {what} {room.device / GIB:.1f} GiB"


def whole_room(trial: Trial) -> Room:
    """Return all that this machine has: the memory of its GPU, whatever others hold of it now, or
    its free memory.
    """
    room = room_of(trial)
    if room.one_memory:
        return room

    there = torch.cuda.get_device_properties(trial.device).total_memory
    return replace(room, device=float(there))


def check_swap_disk(settings: dict[str, Any], memory: Memory) -> None:
    """Raise UsageError if a disk here has less than one rank of the run needs of it."""
    for block in blocks_on_disk(settings).values():
        path = block["nvme_path"]
        free = free_space(path)
        if memory.disk > free:
            raise UsageError(
                f"nvme_path {path}: {memory.disk / 1e9:.1f} GB predicted per rank, there is room"
                f" for {free / 1e9:.1f}; make room, or use more machines"
            )


def free_space(path: str) -> int:
    """Return the bytes that a disk has for swap files; UsageError if their folder is missing."""
    check_folder(path)
    return int(shutil.disk_usage(path).free / SWAP_ROOM)
