"""Write a layout as files that a pretraining run takes: its flags, and DeepSpeed's JSON."""

import json
import shlex
from pathlib import Path
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_output
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.planning.layout import ON_DEVICE, ON_DISK
from megatron_interbert.planning.search import Fit
from megatron_interbert.reading import read_text

FLAGS = "run.yaml"
ENGINE = "deepspeed.json"
SIZES = "model.json"


def settings_of(model: dict[str, Any], found: Fit) -> dict[str, Any]:
    """Return the flags of a run in a layout, by name; `model` holds those of the model."""
    layout = found.layout
    settings = {
        **model,
        "tensor-model-parallel-size": layout.tensor,
        "expert-parallel-size": layout.expert,
        "sequence-parallel": layout.sequence_parallel,
        "recompute-activations": layout.recompute,
        "bf16": layout.half,
        "micro-batch-size": found.samples,
        "global-batch-size": found.samples * found.steps * layout.data,
        "deepspeed-config": ENGINE,
    }
    if ON_DISK in (layout.optimizer_on, layout.parameters_on):
        settings["nvme-path"] = "/local"

    return settings


def engine_json(found: Fit) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a layout; sizes and precision come from the flags."""
    layout = found.layout
    zero: dict[str, Any] = {"stage": layout.zero_stage}
    places = {"offload_optimizer": layout.optimizer_on, "offload_param": layout.parameters_on}
    for name, place in places.items():
        if place != ON_DEVICE:
            zero[name] = {"device": place, "pin_memory": True}
        if place == ON_DISK:
            zero[name]["nvme_path"] = "auto"

    sizes = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )

    return {**dict.fromkeys(sizes, "auto"), "zero_optimization": zero}


def write_recipe(
    folder: Path, model: dict[str, Any], found: Fit, gpu_memory: float, per_node: int
) -> list[str]:
    """Write the files of a layout into a folder, which may be moved; return lines on how to use
    them.

    `model` holds the flags of the model, by name. A device has `gpu_memory` GiB, and a node
    `per_node` of them.
    """
    flags = folder / FLAGS
    name = model["model"]
    sizes = None if name in PRESETS else folder / SIZES
    settings = settings_of({**model, "model": SIZES if sizes else name}, found)
    start, rehearsal = commands_of(flags, found, gpu_memory, per_node)
    lines = [f"# {line}" for line in commands_of(Path(FLAGS), found, gpu_memory, per_node)]
    lines += [f"{name}: {json.dumps(value)}" for name, value in settings.items()]

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--search {folder}: cannot be made ({error.strerror})") from error

    if sizes:
        write_output(sizes, read_text(name, "--model"), "--search")
    write_output(folder / ENGINE, json.dumps(engine_json(found), indent=2) + "\n", "--search")
    write_output(flags, "\n".join(lines) + "\n", "--search")

    told = [f"{flags} and {ENGINE} beside it written", f"start: {start}", f"rehearse: {rehearsal}"]
    if "nvme-path" in settings:
        told.append(f"{flags}: nvme-path is {settings['nvme-path']}; change it to each node's disk")

    return told


def commands_of(flags: Path, found: Fit, gpu_memory: float, per_node: int) -> tuple[str, str]:
    """Return the commands that start a run in a layout and that rehearse it."""
    ranks = found.layout.data * found.layout.tensor
    file = shlex.quote(str(flags))
    run = f"--config {file} --data-path DATA --save RUN --train-iters STEPS"
    start = f"interbert launch --processes {ranks} pretrain {run}"
    if ranks > per_node:
        each = max(n for n in range(1, per_node + 1) if ranks % n == 0)
        nodes = f"--nodes={ranks // each} --gres=gpu:{each} --exclusive"
        start = f"sbatch {nodes} launchers/pretrain.sbatch {run}"

    rehearsal = (
        f"interbert dry-run --world-size {ranks} --gpu-memory {gpu_memory:g} --config {file}"
    )

    return start, f"{rehearsal} --data-path DATA"
