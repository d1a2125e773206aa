"""Write a layout as files that a pretraining run takes: its flags, and DeepSpeed's JSON."""

import json
from pathlib import Path
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_output
from megatron_interbert.planning.layout import ON_DEVICE, ON_DISK
from megatron_interbert.planning.search import Fit

FLAGS = "run.yaml"
ENGINE = "deepspeed.json"


def settings_of(model: str, found: Fit, engine: Path) -> dict[str, Any]:
    """Return the flags of a run in a layout, by name."""
    layout = found.layout
    settings = {
        "model": str(Path(model).absolute()) if Path(model).is_file() else model,
        "tensor-model-parallel-size": layout.tensor,
        "sequence-parallel": layout.sequence_parallel,
        "recompute-activations": layout.recompute,
        "bf16": layout.half,
        "micro-batch-size": found.samples,
        "global-batch-size": found.samples * found.steps * layout.data,
        "deepspeed-config": str(engine.absolute()),
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


def write_recipe(folder: Path, model: str, found: Fit) -> list[str]:
    """Write both files into a folder; return lines on how to use them."""
    flags = folder / FLAGS
    engine = folder / ENGINE
    settings = settings_of(model, found, engine)
    lines = (f"{name}: {json.dumps(value)}" for name, value in settings.items())

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--search {folder}: cannot be made ({error.strerror})") from error

    write_output(engine, json.dumps(engine_json(found), indent=2) + "\n", "--search")
    write_output(flags, "\n".join(lines) + "\n", "--search")

    told = [f"{flags} and {engine} written: interbert pretrain --config {flags} --data-path DATA"]
    if "nvme-path" in settings:
        told.append(f"{flags}: nvme-path is {settings['nvme-path']}; change it to each node's disk")

    return told
