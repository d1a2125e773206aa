"""Build AdamW and its parameter groups, compute the learning-rate schedule, and the global gradient
norm where DeepSpeed computes none.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from enum import IntEnum

import torch
from torch import nn

from megatron_interbert.config.training import TrainConfig
from megatron_interbert.model.partition import is_matrix
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.expert_hooks import has_expert_tags

# Squares summed in float32; their sums are added in float64. Summing 20 M of them in float32 on a
# CPU gives an error of 1 in 1,000.
RUN = 1 << 18


def parameter_groups(
    model: nn.Module,
    config: TrainConfig,
    pretrained: Collection[str] = (),
    most: int = 1 << 62,
) -> list[dict]:
    """Group a model's parameters by weight decay (matrices only, not biases and LayerNorm), by
    learning rate (that of `pretrained` names is scaled by --pretrained-lr-scale), and by whether
    they are experts', which DeepSpeed takes from groups of their own.

    A group that reaches `most` elements is followed by another: ZeRO converts the gradients of one
    group at a time.
    """
    groups: list[dict] = []
    open_groups: dict[tuple[bool, bool, bool], dict] = {}

    for name, parameter in model.named_parameters():
        slow = name in pretrained and config.pretrained_lr_scale != 1.0
        kind = (decays(name, parameter), slow, has_expert_tags(parameter))
        group = open_groups.get(kind)

        if group is None or elements(group["params"]) >= most:
            group = {
                "params": [],
                "weight_decay": config.weight_decay if kind[0] else 0.0,
                "lr": config.lr,
                "lr_scale": config.pretrained_lr_scale if slow else 1.0,
            }
            if has_expert_tags(parameter):
                group |= {"moe": True, "name": parameter.group_name}
            open_groups[kind] = group
            groups.append(group)

        group["params"].append(parameter)

    return groups


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Check whether weight decay applies to a parameter, which ZeRO may have cut."""
    return is_matrix(name, getattr(parameter, "ds_shape", parameter.shape))


def elements(parameters: Iterable[nn.Parameter]) -> int:
    """Count the elements of parameters, wherever ZeRO keeps them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def build_optimizer(groups: list[dict], config: TrainConfig) -> torch.optim.AdamW:
    """Build torch's fused AdamW (CPU and CUDA)."""
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of optimizer step `step` (the first is 1): linear warm-up, then
    linear, cosine, constant or multistep decay.
    """
    warmup = round(config.lr_warmup_fraction * config.train_iters)
    if step <= warmup:
        return config.lr * step / warmup
    if config.lr_decay_style == "multistep":
        passed = sum(step > share * config.train_iters for share in config.milestones())
        return max(config.lr * config.lr_decay_factor**passed, config.min_lr)

    # the last step still has a rate above the minimum
    progress = min((step - 1 - warmup) / max(config.train_iters - warmup, 1), 1.0)
    shape = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "constant": 1.0,
    }[config.lr_decay_style]

    return config.min_lr + (config.lr - config.min_lr) * shape


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's rate: `rate` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


class Held(IntEnum):
    """Tell which ranks hold the same part of a parameter."""

    REPLICATED = 0  # all tensor-parallel ranks
    SHARDED = 1  # none of them
    EXPERT = 2  # those of the expert-data group


def held_as(parameter: nn.Parameter) -> Held:
    """Return which ranks hold the same part of a parameter."""
    if has_expert_tags(parameter):
        return Held.EXPERT
    return Held.SHARDED if getattr(parameter, "tensor_model_parallel", False) else Held.REPLICATED


def gradient_norm(
    gradients: Sequence[Sequence[torch.Tensor]],
    state: ParallelState,
    device: torch.device | str,
    partitioned: bool = False,
) -> float:
    """Compute the global gradient norm from this rank's gradients of each kind of `Held`; inf on
    every rank if it is not finite on any.

    Each part counts once, however many ranks hold it. `partitioned`: no two data-parallel ranks
    hold the same part of a gradient. The host synchronises with the device once.
    """
    squares = torch.stack([_square_sum(tensors, device) for tensors in gradients])

    if partitioned:
        state.sum_over_data(squares)
    elif state.experts_apart:
        squares[Held.EXPERT] /= state.expert_data_size
        state.sum_over_data(squares[Held.EXPERT])

    # Replicated gradients are the same on all tensor-parallel ranks, so their mean is their value,
    # and it is not finite if any of them is not.
    squares[Held.REPLICATED] /= state.tensor_size
    total = float(state.sum_over_tensor(squares).sum())

    return math.sqrt(total) if math.isfinite(total) else math.inf


def _square_sum(tensors: Sequence[torch.Tensor], device: torch.device | str) -> torch.Tensor:
    """Sum all squares: float64 scalar. Takes few operations, however many tensors there are."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)

    runs = [run for tensor in tensors for run in _runs(tensor)]
    norms = torch._foreach_norm(runs, dtype=torch.float32)

    return torch.stack(norms).double().square().sum()


def _runs(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Split a tensor into groups of rows small enough to sum their squares in float32."""
    if tensor.numel() <= RUN:
        return [tensor]

    rows = max(1, RUN * len(tensor) // tensor.numel())

    return tensor.split(rows)
