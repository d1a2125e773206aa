"""The update: gradient norm, clipping, AdamW. By us wherever that is right and faster, else by DeepSpeed.

| | where | gradient norm, clipping, check | AdamW |
|---|---|---|---|
| `WholeUpdate` | fp32 or bf16 on one data-parallel rank, whatever the ZeRO stage; fp32 at stage 0 | ours | ours |
| `PartitionedUpdate` | fp32 or bf16 at ZeRO stages 1 and 2 | ours | DeepSpeed's, on a rank's part |
| `DeepSpeedUpdate` | fp16 with its loss scale, ZeRO stage 3, offload | DeepSpeed's | DeepSpeed's |

On one data-parallel rank there is nothing for ZeRO to share out, but its hooks, copies and checks for each parameter
would stay. Its own check for gradients that are not finite takes 13 operations for each of them; the norm says the same.
"""

import math
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from megatron_interbert.config import TrainConfig
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.deepspeed_config import offloads
from megatron_interbert.training.master_weights import MasterWeights
from megatron_interbert.training.optimizer import build_optimizer, gradient_norm, is_sharded


class DeepSpeedUpdate:
    """All of it by DeepSpeed."""

    def __init__(self, groups: list[dict], config: TrainConfig, state: ParallelState) -> None:
        self.config, self.state = config, state
        self.stage = config.zero_stage  # at which weights and moments are shared out
        self.optimizer = build_optimizer(groups, config)

    def settings(self, deepspeed_config: dict[str, Any]) -> dict[str, Any]:
        """DeepSpeed's configuration as this kind of update needs it."""
        return deepspeed_config

    def start(self, engine: DeepSpeedEngine) -> None:
        """Take the engine that was made with `settings` and `optimizer`."""
        self.engine = engine

    def after_backward(self) -> None:
        """Of each micro-batch."""

    def step(self) -> tuple[float, bool]:
        """(Gradient norm before clipping, whether weights were updated), the same on all ranks."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()

        return math.nan if norm is None else float(norm), self.engine.was_step_applied()

    def clip(self, norm: float) -> None:
        """Have AdamW divide gradients while it updates, so that clipping needs no pass of its own."""
        if self.config.clip_grad:
            excess = max(1.0, norm / self.config.clip_grad)
            self.optimizer.grad_scale = torch.full((), excess, dtype=torch.float32, device=self.engine.device)


class PartitionedUpdate(DeepSpeedUpdate):
    """By DeepSpeed on each rank's part of the gradients, whose norm is ours."""

    def settings(self, deepspeed_config: dict[str, Any]) -> dict[str, Any]:
        """Without DeepSpeed's norm, clipping and check."""
        return {
            **deepspeed_config,
            "gradient_clipping": 0.0,
            "bf16": {**deepspeed_config["bf16"], "check_grad_overflow": False},
            "zero_optimization": {**deepspeed_config["zero_optimization"], "compute_grad_norm": False},
        }

    def step(self) -> tuple[float, bool]:
        norm = gradient_norm(*self._gradients(), self.state, partitioned=True)

        if math.isfinite(norm):
            self.clip(norm)
            self.engine.step()
        else:
            self._discard()

        return norm, self.engine.was_step_applied()

    def _gradients(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """This rank's part: (of replicated parameters, of shards)."""
        zero = self.engine.optimizer
        kinds: dict[bool, list[torch.Tensor]] = {False: [], True: []}

        for number, parameters in enumerate(zero.params_in_partition):
            # What fills the last rank's part up to the size of the others stands at the end, and there is no parameter for it.
            for gradient, parameter in zip(zero.averaged_gradients[number], parameters, strict=False):
                kinds[is_sharded(parameter)].append(gradient)

        return kinds[False], kinds[True]

    def _discard(self) -> None:
        """A step that DeepSpeed gives up, for its own check, on for this once, finds a NaN: so it drops all that it holds."""
        zero = self.engine.optimizer
        zero.averaged_gradients[0][0].fill_(math.nan)  # the norm may be infinite though no gradient is
        zero.check_grad_overflow = True
        self.engine.step()
        zero.check_grad_overflow = False


class WholeUpdate(DeepSpeedUpdate):
    """By us, of the weights that a rank holds whole (its tensor-parallel slice); DeepSpeed knows of no ZeRO and no bf16."""

    def __init__(self, groups: list[dict], config: TrainConfig, state: ParallelState, model: nn.Module) -> None:
        self.model, self.masters = model, None

        if config.bf16:
            self.masters = MasterWeights(model, torch.bfloat16)
            twins = {follower: twin for twin, follower in self.masters.pairs()}
            groups = [{**group, "params": [twins[parameter] for parameter in group["params"]]} for group in groups]

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
        # With nothing to sum, gradients would be copied into a bucket and back.
        engine.enable_backward_allreduce = self.state.data_size > 1

    def weights(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(fp32 weight that Adam updates, the model's parameter) of all parameters; with fp32 these are the same."""
        return self.masters.pairs() if self.masters else [(p, p) for p in self.model.parameters()]

    def refresh_model(self) -> None:
        """Have the model compute with the fp32 weights as they are now."""
        if self.masters is not None:
            self.masters.refresh_model()

    def after_backward(self) -> None:
        if self.masters is not None:
            self.masters.take_gradients()

    def step(self) -> tuple[float, bool]:
        norm = gradient_norm(*self._gradients(), self.state)
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

    def _gradients(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(Of replicated parameters, of shards)."""
        if self.masters is not None:
            return self.masters.gradients()

        kinds: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            kinds[is_sharded(parameter)].append(parameter.grad)

        return kinds[False], kinds[True]


def choose_update(
    model: nn.Module, groups: list[dict], config: TrainConfig, state: ParallelState, deepspeed_config: dict[str, Any]
) -> DeepSpeedUpdate:
    """The kind of update of a run; see the table above."""
    if config.fp16 or offloads(deepspeed_config):
        return DeepSpeedUpdate(groups, config, state)

    if state.data_size == 1 or config.zero_stage == 0:
        return WholeUpdate(groups, config, state, model)

    kind = PartitionedUpdate if config.zero_stage < 3 else DeepSpeedUpdate
    return kind(groups, config, state)
