"""Wrap a model in a DeepSpeed engine that steps the same way for every ZeRO stage and precision."""

import contextlib
import math
import os
from collections.abc import Collection
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from torch import nn

from megatron_interbert.config.training import TrainConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.planning.layout import BUCKET, SUB_GROUP, Division, update_size
from megatron_interbert.training.deepspeed_config import blocks_on_disk, merge, zero_settings
from megatron_interbert.training.ema import AveragedWeights
from megatron_interbert.training.expert_hooks import announce_experts, has_expert_tags
from megatron_interbert.training.optimizer import (
    decays,
    elements,
    parameter_groups,
    set_learning_rate,
)
from megatron_interbert.training.update import choose_update


def half_precision_supported() -> bool:
    """Check whether the device computes in float16 (GPUs do, only some CPUs do)."""
    return deepspeed.get_accelerator().is_fp16_supported()


def engine_settings(config: TrainConfig, state: ParallelState, model: nn.Module) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a model, whose parameters may be without memory.

    Where the JSON is silent, buffers are smaller than DeepSpeed's own, which hold 500 M gradients
    (2 GB in fp32) and convert 1 G of them at a time for the optimizer.
    """
    settings = merge(config, state.data_size)
    zero = settings["zero_optimization"]
    zero.setdefault("reduce_bucket_size", min(elements(model.parameters()), BUCKET))
    if config.zero_stage == 3:
        zero.setdefault("sub_group_size", SUB_GROUP)
    if on_disk := blocks_on_disk(settings).get("offload_param"):
        largest = max(partition_size(p, state) for p in model.parameters())
        on_disk.setdefault("buffer_size", largest)
        check_disk_buffers(config, settings, largest)
        zero["stage3_max_reuse_distance"] = 0
        zero.pop("max_reuse_distance", None)  # the same under DeepSpeed's other name
    elif config.zero_stage == 3:
        parsed = zero_settings(settings)
        if "max_reuse_distance" not in parsed.model_fields_set:
            # DeepSpeed keeps what is used again within this distance, whatever its live limit: in
            # the backward pass, after all that follows it twice
            distance = min(parsed.max_reuse_distance, 2 * parsed.max_live_parameters)
            zero["stage3_max_reuse_distance"] = distance

    return settings


def updated_at_once(model: nn.Module, config: TrainConfig, state: ParallelState) -> int:
    """Return the elements at which a group of the optimizer is full; chosen as if all parameters
    had the same learning rate (see --pretrained-lr-scale).
    """
    if config.zero_stage == 3:
        return SUB_GROUP

    kinds: dict[bool, list[tuple[int, bool]]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        kinds[has_expert_tags(parameter)].append((parameter.numel(), decays(name, parameter)))

    parts = [Division(tuple(kinds[False]), state.data_size)]
    if kinds[True]:
        parts.append(Division(tuple(kinds[True]), state.expert_data_size))

    return update_size(parts)


def partition_size(parameter: nn.Parameter, state: ParallelState) -> int:
    """Return the elements of a parameter that a rank keeps at ZeRO stage 3."""
    ranks = state.expert_data_size if has_expert_tags(parameter) else state.data_size
    return math.ceil(elements([parameter]) / ranks)


def check_disk_buffers(config: TrainConfig, settings: dict[str, Any], largest: int) -> None:
    """Raise UsageError if parameters on a disk would not get through their buffers: each gathered
    one holds one of them, `largest` is the most elements that it needs, and parameters that
    DeepSpeed kept for their next use would soon hold all.
    """
    zero = zero_settings(settings)
    size = zero.offload_param.buffer_size
    if size < largest:
        raise UsageError(
            f"{config.deepspeed_config}: offload_param.buffer_size is {size}, but a rank's share of"
            f" the largest parameter has {largest} elements; leave it out"
        )

    if "max_reuse_distance" in zero.model_fields_set and zero.max_reuse_distance:
        raise UsageError(
            f"{config.deepspeed_config}: stage3_max_reuse_distance is {zero.max_reuse_distance},"
            " but with offload_param to nvme only 0 works: DeepSpeed would run out of buffers;"
            " leave it out"
        )


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon with torch's compiler switched off.

    ZeRO imports it to recognise that optimizer, and it compiles a function on import. Nothing here
    uses Muon, yet loading the compiler would cost each rank 2 s and 44 MB.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

    try:
        with contextlib.suppress(ImportError):
            import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


class Engine:
    """Run a model and its optimizer under DeepSpeed.

    Call `backward` for each micro-batch, then `step` once. `precision` is fp16, bf16 or fp32. A
    model that DeepSpeed has split already was built by the same `settings`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        state: ParallelState,
        pretrained: Collection[str] = frozenset(),
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.state = state
        self.deepspeed_config = settings or engine_settings(config, state, model)
        self.accumulation = self.deepspeed_config["gradient_accumulation_steps"]
        self.precision = "fp16" if config.fp16 else "bf16" if config.bf16 else "fp32"
        if config.fp16 and not half_precision_supported():
            raise UsageError("--fp16: this processor cannot compute in half precision; use --bf16")

        at_once = updated_at_once(model, config, state)
        groups = parameter_groups(model, config, pretrained, most=at_once)
        self.update = choose_update(model, groups, config, state, self.deepspeed_config)
        device = next(model.parameters()).device
        import_muon_uncompiled()
        announce_experts(model, state)
        self.deepspeed, *_ = deepspeed.initialize(
            # Otherwise it takes LOCAL_RANK for the GPU's number, which is 0 if a process sees only
            # one GPU.
            args=SimpleNamespace(device_rank=device.index or 0),
            model=model,
            optimizer=self.update.optimizer,
            config=self.update.settings(self.deepspeed_config),
            mpu=state,
            dist_init_required=False,
        )
        self.update.start(self.deepspeed)
        self.ema = AveragedWeights(config.ema_decay) if config.ema_decay else None

    @property
    def model(self) -> nn.Module:
        """Return the wrapped model, for evaluation and saving."""
        return self.deepspeed.module

    def forward(self, *inputs: Any) -> Any:
        """Run the model's forward pass through the engine (casts, ZeRO-3 gathers)."""
        return self.deepspeed(*inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradient of a micro-batch's share of the step's loss; `last`: it is the
        step's last one.

        DeepSpeed averages over data-parallel ranks; the factor here turns that into a sum.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        if self.state.data_size > 1:
            loss = loss * self.state.data_size

        self.deepspeed.backward(loss, scale_wrt_gas=False)
        self.update.after_backward()

    def step(self, rate: float) -> tuple[float, bool]:
        """Clip and update; return (gradient norm before clipping, whether weights were updated).

        A non-finite norm on any rank leaves weights and moments unchanged on all ranks.
        """
        set_learning_rate(self.deepspeed.optimizer, rate)
        return self.update.step()

    def loss_scale(self) -> float:
        """Return the current loss scale; 1 without fp16."""
        return float(self.deepspeed.optimizer.loss_scale) if self.precision == "fp16" else 1.0
