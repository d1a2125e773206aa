"""Update the weights from a step's gradients: norm, clipping, AdamW; by our code where faster.

- `WholeUpdate`: all by our code. For fp32 and bf16 on one data-parallel rank, whatever the ZeRO
  stage, and for fp32 at stage 0.
- `PartitionedUpdate`: norm, clipping and the check for non-finite gradients by our code, AdamW by
  DeepSpeed on a rank's part. For fp32 and bf16 at ZeRO stages 1 and 2.
- `DeepSpeedUpdate`: all by DeepSpeed. For fp16 with its loss scale, ZeRO stage 3, and offload.

On one data-parallel rank ZeRO has nothing to shard, yet its hooks and copies for each parameter
would remain. Its check for non-finite gradients takes 13 operations for each of them, and the norm
reveals the same.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import nn

from megatron_interbert.config.training import TrainConfig
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.deepspeed_config import offloads
from megatron_interbert.training.master_weights import MasterWeights
from megatron_interbert.training.optimizer import Held, build_optimizer, gradient_norm, held_as
from megatron_interbert.training.swap import check_swap_files


class DeepSpeedUpdate:
    """Leave the whole update to DeepSpeed."""

    def __init__(self, groups: list[dict], config: TrainConfig, state: ParallelState) -> None:
        self.config = config
        self.state = state
        self.stage = config.zero_stage  # at which weights and moments are sharded
        self.optimizer = build_optimizer(groups, config)

    def settings(self, deepspeed_config: dict[str, Any]) -> dict[str, Any]:
        """Return DeepSpeed's configuration as this kind of update needs it."""
        return deepspeed_config

    def start(self, engine: DeepSpeedEngine) -> None:
        """Take the engine that was built with `settings` and `optimizer`."""
        self.engine = engine

    def after_backward(self) -> None:
        """Process the gradients of a micro-batch; DeepSpeed needs nothing here, but may have
        written them to a disk.
        """
        self._check_swap()

    def _check_swap(self) -> None:
        if self.stage == 3:
            check_swap_files(self.engine.optimizer)

    def step(self) -> tuple[float, bool]:
        """Clip and update; return (gradient norm before clipping, whether weights were updated),
        the same on all ranks.
        """
        self.engine.step()
        self._check_swap()
        norm = self.engine.get_global_grad_norm()

        return math.nan if norm is None else float(norm), self.engine.was_step_applied()

    def clip(self, norm: float) -> None:
        """Have AdamW scale gradients as it updates, so that clipping needs no extra pass."""
        if not self.config.clip_grad:
            return

        excess = max(1.0, norm / self.config.clip_grad)
        scale = torch.full((), excess, dtype=torch.float32, device=self.engine.device)
        self.optimizer.grad_scale = scale


class PartitionedUpdate(DeepSpeedUpdate):
    """Leave AdamW on each rank's part to DeepSpeed, but compute the norm and clip here."""

    def settings(self, deepspeed_config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration without DeepSpeed's norm, clipping and check."""
        return {
            **deepspeed_config,
            "gradient_clipping": 0.0,
            "bf16": {**deepspeed_config["bf16"], "check_grad_overflow": False},
            "zero_optimization": {
                **deepspeed_config["zero_optimization"],
                "compute_grad_norm": False,
            },
        }

    def step(self) -> tuple[float, bool]:
        gradients = self._gradients()
        norm = gradient_norm(gradients, self.state, self.engine.device, partitioned=True)

        if math.isfinite(norm):
            self.clip(norm)
            self.engine.step()
        else:
            self._discard()

        return norm, self.engine.was_step_applied()

    def _gradients(self) -> list[list[torch.Tensor]]:
        """Return this rank's part of the gradients of each kind of `Held`."""
        zero = self.engine.optimizer
        found: list[list[torch.Tensor]] = [[] for _ in Held]

        for number, parameters in enumerate(zero.params_in_partition):
            gradients = zero.averaged_gradients[number]
            # Zeros that pad a part to the size of the others belong to no parameter.
            real = [g for g in gradients if not getattr(g, "_zero_padding", False)]
            for gradient, parameter in zip(real, parameters, strict=False):
                found[held_as(parameter)].append(gradient)

        return found

    def _discard(self) -> None:
        """Have DeepSpeed skip the step and drop its gradients."""
        zero = self.engine.optimizer
        # Its own check, enabled for this once, must find something: the norm may be infinite
        # although no gradient is.
        zero.averaged_gradients[0][0].fill_(math.nan)
        zero.check_grad_overflow = True
        self.engine.step()
        zero.check_grad_overflow = False


class WholeUpdate(DeepSpeedUpdate):
    """Update weights that each rank holds whole (its tensor-parallel slice), by our code.

    DeepSpeed is configured without ZeRO and bf16: it only steps a plain model and optimizer.
    """

    def __init__(
        self,
        groups: list[dict],
        config: TrainConfig,
        state: ParallelState,
        model: nn.Module,
    ) -> None:
        self.model = model
        self.masters: MasterWeights | None = None

        if config.bf16:
            self.masters = MasterWeights(model, torch.bfloat16)
            twins = {follower: twin for twin, follower in self.masters.pairs()}
            groups = [{**group, "params": [twins[p] for p in group["params"]]} for group in groups]

        super().__init__(groups, config, state)
        self.stage = 0

    def settings(self, deepspeed_config: dict[str, Any]) -> dict[str, Any]:
        return {
            **deepspeed_config,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": False},
            "zero_optimization": {"stage": 0},
        }

    def start(self, engine: DeepSpeedEngine) -> None:
        super().start(engine)
        # With nothing to sum, it would copy gradients into a bucket and back.
        engine.enable_backward_allreduce = self.state.data_size > 1

    def weights(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return (fp32 weight that Adam updates, the model's parameter) for all parameters.

        In fp32 both are the same: Adam updates the model's own parameters.
        """
        return self.masters.pairs() if self.masters else [(p, p) for p in self.model.parameters()]

    def refresh_model(self) -> None:
        """Round the current fp32 weights into the model's parameters."""
        if self.masters is not None:
            self.masters.refresh_model()

    def after_backward(self) -> None:
        if self.masters is not None:
            self.masters.take_gradients()

    def step(self) -> tuple[float, bool]:
        """Update the weights and the model; a non-finite norm leaves both unchanged."""
        gradients = self._gradients()
        self._sum_experts(gradients[Held.EXPERT])
        norm = gradient_norm(gradients, self.state, self.engine.device)
        finite = math.isfinite(norm)

        if finite:
            self.clip(norm)
            self.engine.step()
        else:
            self.engine.zero_grad()

        if self.masters is not None:
            self.masters.drop_gradients()
            if finite:
                self.masters.refresh_model()

        return norm, finite

    def _sum_experts(self, gradients: list[torch.Tensor]) -> None:
        """Sum the gradients of experts over the ranks that hold the same ones, if DeepSpeed sums
        nothing: tensor-parallel ranks send them different rows.
        """
        if self.engine.enable_backward_allreduce or self.state.expert_data_size == 1:
            return
        for gradient in gradients:
            dist.all_reduce(gradient, group=self.state.expert_data_group)

    def _gradients(self) -> list[list[torch.Tensor]]:
        """Return the gradients of each kind of `Held`."""
        if self.masters is not None:
            return self.masters.gradients()

        found: list[list[torch.Tensor]] = [[] for _ in Held]
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found[held_as(parameter)].append(parameter.grad)

        return found


def choose_update(
    model: nn.Module,
    groups: list[dict],
    config: TrainConfig,
    state: ParallelState,
    deepspeed_config: dict[str, Any],
) -> DeepSpeedUpdate:
    """Choose the kind of update for a run, as listed at the top of this file."""
    kind = update_kind(config, state, deepspeed_config)
    if kind is WholeUpdate:
        return WholeUpdate(groups, config, state, model)

    return kind(groups, config, state)


def update_kind(
    config: TrainConfig, state: ParallelState, deepspeed_config: dict[str, Any]
) -> type[DeepSpeedUpdate]:
    """Return the kind of update for a run."""
    if config.fp16 or offloads(deepspeed_config):
        return DeepSpeedUpdate

    if state.data_size == 1 or config.zero_stage == 0:
        return WholeUpdate

    return PartitionedUpdate if config.zero_stage < 3 else DeepSpeedUpdate


def shards_weights(
    config: TrainConfig, state: ParallelState, deepspeed_config: dict[str, Any]
) -> bool:
    """Check whether DeepSpeed splits the weights among the data-parallel ranks (stage 3)."""
    kind = update_kind(config, state, deepspeed_config)
    return config.zero_stage == 3 and kind is DeepSpeedUpdate
