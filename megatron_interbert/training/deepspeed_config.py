"""Merge flags and DeepSpeed's JSON: resolve "auto", refuse conflicts and unknown keys.

DeepSpeed itself does neither: it ignores unknown top-level keys and takes "auto" for a value.
"""

import copy
from pathlib import Path
from typing import Any

from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from pydantic import ValidationError

import megatron_interbert
from megatron_interbert.config.options import AUTO, facts_of, flag, nearest, rows
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_json

PASSED_THROUGH = {
    "zero_optimization",
    "fp16",
    "bf16",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_force_ds_cpu_optimizer",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "steps_per_print",
}
TOP_LEVEL = PASSED_THROUGH | {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
}
# of ZeRO++; its secondary partitions (zero_hpz_partition_size) are supported
QUANTISED = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)
REFUSED = {
    "scheduler": "use --lr-decay-style, --lr-warmup-fraction and --min-lr",
    "tensorboard": "use --tensorboard-dir",
    "activation_checkpointing": "use --recompute-activations",
}
# torch_adam is accepted, though the optimizer is always torch's AdamW
OPTIMIZER_PARAMETERS = {"lr", "betas", "eps", "weight_decay", "torch_adam"}
BLOCKS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
}


def read_deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """Read and check the JSON of --deepspeed_config; {} if it is not given."""
    if not config.deepspeed_config:
        return {}

    where = config.deepspeed_config
    values = read_json(shipped(where) or where, "--deepspeed-config")
    for key in values:
        if key in REFUSED:
            raise UsageError(f"{where}: '{key}' is not used here; {REFUSED[key]}")
        if key not in TOP_LEVEL:
            raise UsageError(f"{where}: unknown DeepSpeed key '{key}'{nearest(key, TOP_LEVEL)}")

    blocks = {
        path: {n for entry, info in m.model_fields.items() for n in (entry, info.alias) if n}
        for path, m in BLOCKS.items()
    }
    for path, known in {
        **blocks,
        "optimizer": {"type", "params"},
        "optimizer.params": OPTIMIZER_PARAMETERS,
    }.items():
        block = _get(values, path)
        if block is not None and not isinstance(block, dict):
            raise UsageError(
                f"{where}: '{path}' is {block!r}, expected an object such as {{\"{min(known)}\":"
                " ..}"
            )

        for key in block or {}:
            if key not in known:
                raise UsageError(f"{where}: unknown key '{key}' in '{path}'{nearest(key, known)}")

    for key in QUANTISED:
        if _get(values, f"zero_optimization.{key}"):
            raise UsageError(
                f"{where}: {key} is not supported: DeepSpeed rounds with a CUDA kernel, and losses"
                " and checkpoints with it have never been compared; leave it out"
            )

    check_numbers(values, where)
    betas = _get(values, "optimizer.params.betas")
    if betas not in (None, "auto") and not (isinstance(betas, list) and len(betas) == 2):
        raise UsageError(f"{where}: optimizer.params.betas is {betas!r}, expected two numbers")

    kind = _get(values, "optimizer.type")
    if kind not in (None, "auto", "AdamW", "Adam"):
        raise UsageError(f"{where}: optimizer type '{kind}', expected 'AdamW'")

    return values


def shipped(name: str) -> Path | None:
    """Find the JSON file of a name such as `zero2` among those shipped here; None if the name is a
    path.

    Raises UsageError for a plain name that is neither a file nor shipped.
    """
    if "/" in name or name.endswith(".json") or Path(name).is_file():
        return None

    package = Path(megatron_interbert.__file__).parent
    places = (package / "ds_configs", package.parent / "ds_configs")
    files = {path.stem: path for place in places for path in sorted(place.glob("*.json"))}
    if name not in files:
        raise UsageError(
            f"--deepspeed-config {name}: no such file{nearest(name, files)}; expected a JSON file"
            f" or one of {', '.join(files)}"
        )

    return files[name]


def check_numbers(values: dict[str, Any], where: str) -> None:
    """Raise UsageError for values that DeepSpeed's own models of a block refuse."""
    for path in ("zero_optimization", "fp16", "bf16"):
        block = _without_auto(_get(values, path) or {})
        # these two are checked as flags
        block = {key: value for key, value in block.items() if key not in ("stage", "enabled")}

        try:
            BLOCKS[path](**block)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            said = f"{first['msg']} (got {first['input']!r})"
            raise UsageError(f"{where}: '{path}.{key}': {said}") from error


def agree_with_json(config: TrainConfig) -> dict[str, Any]:
    """Return the JSON of --deepspeed_config, after copying the values that flags can set too into
    `config`. Raises UsageError if both are given and differ.
    """
    values = copy.deepcopy(read_deepspeed_config(config))
    for name, facts in rows(config):
        if facts.deepspeed:
            _agree(config, values, facts.deepspeed, name)

    accumulation = values.get("gradient_accumulation_steps", "auto")
    if config.micro_batch_size == AUTO and accumulation != "auto":
        raise UsageError(
            f"{config.deepspeed_config}: gradient_accumulation_steps is {accumulation}, but that"
            ' follows from --micro-batch-size auto; write "auto" there too'
        )

    return values


def merge(config: TrainConfig, data_parallel_size: int, resumed_batch: int = 0) -> dict[str, Any]:
    """Return the dictionary for deepspeed.initialize; what only the JSON sets goes into `config`.

    `resumed_batch` is the global batch size of the checkpoint to resume from, which is kept unless
    another one is given; 0 without a checkpoint.
    """
    resumes = resumed_batch and config.is_default("global_batch_size")
    values = agree_with_json(config)
    accumulation = values.get("gradient_accumulation_steps", "auto")

    if accumulation != "auto" and config.is_default("global_batch_size"):
        config.fit_to_groups()
        together = accumulation * config.micro_batch_size * data_parallel_size
        origin = f"gradient_accumulation_steps in {config.deepspeed_config}"
        config.settle("global_batch_size", together, origin)
    elif resumes:
        config.settle("global_batch_size", resumed_batch, "the checkpoint")

    config.fit_batches(data_parallel_size)
    config.check()
    check_offload(config, values)
    check_secondary_partition(config, values, data_parallel_size)
    steps = config.accumulation_steps(data_parallel_size)
    if accumulation not in ("auto", steps):
        raise UsageError(
            f"{config.deepspeed_config}: gradient_accumulation_steps is {accumulation}, but"
            f" {config.told('global_batch_size')} needs {steps}; remove one of them"
        )

    config.global_batch_size = config.global_batch(data_parallel_size)

    return _for_engine(config, values, steps)


def offloads(values: dict[str, Any]) -> bool:
    """Check whether a DeepSpeed configuration offloads weights or moments to the host."""
    return any(block.get("device", "none") != "none" for block in offload_blocks(values).values())


def offload_blocks(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the blocks of a DeepSpeed configuration on offload, by name; {} for a missing one."""
    return {
        name: _get(values, f"zero_optimization.{name}") or {}
        for name in ("offload_optimizer", "offload_param")
    }


def blocks_on_disk(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the blocks of a DeepSpeed configuration that offload to NVMe disks, by name."""
    blocks = offload_blocks(values)
    return {name: block for name, block in blocks.items() if block.get("device") == "nvme"}


def described_offload(values: dict[str, Any]) -> str:
    """Return what a DeepSpeed configuration offloads, as an addition to a line; "" for nothing."""
    names = {"offload_optimizer": "optimizer", "offload_param": "parameters"}
    blocks = offload_blocks(values)
    places = {name: blocks[key].get("device", "none") for key, name in names.items()}
    said = [f"{name} to {place}" for name, place in places.items() if place != "none"]

    return f", offload of {' and '.join(said)}" if said else ""


def zero_settings(values: dict[str, Any]) -> DeepSpeedZeroConfig:
    """Return the block on ZeRO as DeepSpeed reads it, without the stage, which a flag may set."""
    block = _without_auto(_get(values, "zero_optimization") or {})
    return DeepSpeedZeroConfig(**{key: value for key, value in block.items() if key != "stage"})


def check_offload(config: TrainConfig, values: dict[str, Any]) -> None:
    """Raise UsageError for offload that the ZeRO stage does not have, or to an NVMe disk without
    its folder; `"nvme_path": "auto"` becomes --nvme-path.
    """
    where = config.deepspeed_config
    blocks = offload_blocks(values)
    if config.nvme_path and not blocks_on_disk(values):
        raise UsageError(
            f"--nvme-path {config.nvme_path}: nothing is offloaded to a disk; give"
            " --deepspeed-config zero3_nvme_optimizer or zero3_nvme, or leave it out"
        )

    for name, block in blocks.items():
        device = block.get("device", "none")
        if device == "none":
            continue

        least = 3 if name == "offload_param" or device == "nvme" else 1
        if config.zero_stage < least:
            raise UsageError(
                f"{where}: {name} to {device} needs ZeRO stage {least} or higher,"
                f" {config.told('zero_stage')} is less"
            )

        if device == "nvme":
            if block.get("nvme_path") in (None, "auto"):
                block["nvme_path"] = config.nvme_path or config.usual_disk
            if not block["nvme_path"]:
                raise UsageError(
                    f"{where}: {name} to nvme needs a folder on a disk of each machine; give"
                    " --nvme-path"
                )


def check_secondary_partition(config: TrainConfig, values: dict[str, Any], ranks: int) -> None:
    """Raise UsageError if data-parallel ranks cannot be divided into ZeRO++'s secondary groups.

    DeepSpeed takes neighbouring ranks for a group; tensor-parallel ones hold different slices.
    """
    size = min(zero_settings(values).zero_hpz_partition_size, ranks)
    if config.zero_stage < 3 or size < 2:
        return

    if config.tensor_model_parallel_size > 1:
        raise UsageError(
            f"{config.deepspeed_config}: zero_hpz_partition_size needs"
            " --tensor-model-parallel-size 1: DeepSpeed would mix the slices of neighbouring ranks;"
            " leave one of them out"
        )

    if offload_blocks(values)["offload_param"].get("device", "none") != "none":
        raise UsageError(
            f"{config.deepspeed_config}: zero_hpz_partition_size keeps more of the weights on the"
            " GPUs, offload_param moves them off; leave one of them out"
        )

    if ranks % size:
        raise UsageError(
            f"{config.deepspeed_config}: zero_hpz_partition_size {size} does not divide the {ranks}"
            " data-parallel ranks; give the number of GPUs of a node"
        )


def refuse_secondary_partition(config: TrainConfig) -> None:
    """Raise UsageError for ZeRO++'s secondary groups, for a model with experts: DeepSpeed would
    build them across ranks that hold different ones.
    """
    size = zero_settings(read_deepspeed_config(config)).zero_hpz_partition_size
    if config.zero_stage == 3 and size > 1:
        raise UsageError(
            f"{config.deepspeed_config}: zero_hpz_partition_size is {size}, which experts do not"
            " support; leave it out"
        )


def _agree(config: TrainConfig, values: dict[str, Any], path: str, name: str) -> None:
    """Settle a flag against its JSON value: the one given wins; if both are, they must agree."""
    theirs = _get(values, path)
    if theirs is None or theirs == "auto":
        return

    ours = getattr(config, name)
    choices = facts_of(config, name).choices
    if not isinstance(theirs, (int, float)) or (choices and theirs not in choices):
        expected = f"one of {', '.join(map(str, choices))}" if choices else type(ours).__name__
        raise UsageError(f"{config.deepspeed_config}: {path} is {theirs!r}, expected {expected}")

    if name in config.given and ours != theirs:
        what_to_do = 'make them equal, or write "auto" there'
        if shipped(config.deepspeed_config):
            what_to_do = "leave one of them out"
        raise UsageError(
            f"{flag(name)} is {'auto' if ours == AUTO else ours}, but {config.deepspeed_config}"
            f" sets {path} = {theirs}; {what_to_do}"
        )

    if name not in config.given:
        config.settle(name, type(ours)(theirs), f"{path} in {config.deepspeed_config}")


def _for_engine(config: TrainConfig, values: dict[str, Any], accumulation: int) -> dict[str, Any]:
    engine = {
        key: _without_auto(value)
        for key, value in values.items()
        if key in PASSED_THROUGH and value != "auto"
    }

    engine |= {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": float(config.clip_grad),
        # torch's fused AdamW runs on CPU
        "zero_force_ds_cpu_optimizer": values.get("zero_force_ds_cpu_optimizer", False),
        "zero_optimization": {
            "overlap_comm": False,
            **(engine.get("zero_optimization") or {}),
            "stage": config.zero_stage,
        },
        "fp16": {
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            **engine.get("fp16", {}),
            "enabled": config.fp16,
        },
        # Without this check a NaN in one batch would reach the weights.
        "bf16": {"check_grad_overflow": True, **engine.get("bf16", {}), "enabled": config.bf16},
    }
    engine.setdefault("steps_per_print", 10**9)

    return engine


def _get(values: dict[str, Any], path: str) -> Any:
    """Look up a path such as `optimizer.params.betas.0`; None if it does not exist."""
    for key in path.split("."):
        if isinstance(values, list) and key.isdigit() and int(key) < len(values):
            values = values[int(key)]
        elif isinstance(values, dict) and key in values:
            values = values[key]
        else:
            return None

    return values


def _without_auto(value: Any) -> Any:
    """Drop nested "auto" entries, so that DeepSpeed's own defaults apply."""
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(entry) for key, entry in value.items() if entry != "auto"}
