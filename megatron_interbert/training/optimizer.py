"""AdamW with parameter groups, the learning-rate schedule, and the global gradient norm where DeepSpeed gives none."""

import math
from collections.abc import Collection, Iterable

import torch
from torch import nn

from megatron_interbert.config import TrainConfig
from megatron_interbert.parallel.state import ParallelState

SUMMED = 1 << 18  # squares that are added up in float32; beyond them in float64


def parameter_groups(model: nn.Module, config: TrainConfig, pretrained: Collection[str] = ()) -> list[dict]:
    """Groups by weight decay (matrices only, not biases and LayerNorm) and by rate (`pretrained` names are scaled)."""
    groups: dict[tuple[bool, bool], dict] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.dim() > 1
        slow = name in pretrained and config.pretrained_lr_scale != 1.0
        group = groups.setdefault(
            (decays, slow),
            {
                "params": [],
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr": config.lr,
                "lr_scale": config.pretrained_lr_scale if slow else 1.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(groups: list[dict], config: TrainConfig) -> torch.optim.AdamW:
    """torch's fused AdamW (CPU and CUDA)."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of optimizer step `step` (1 is the first): linear warm-up, then linear, cosine, constant or in steps."""
    warmup = round(config.lr_warmup_fraction * config.train_iters)
    if step <= warmup:
        return config.lr * step / warmup
    if config.lr_decay_style == "multistep":
        passed = sum(step > share * config.train_iters for share in config.milestones())
        return max(config.lr * config.lr_decay_factor**passed, config.min_lr)
    progress = min((step - 1 - warmup) / max(config.train_iters - warmup, 1), 1.0)  # the last step still moves
    shape = {"linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[config.lr_decay_style]
    return config.min_lr + (config.lr - config.min_lr) * shape


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def gradient_norm(parameters: Iterable[nn.Parameter], state: ParallelState) -> float:
    """Global norm over tensor-parallel ranks: shards are summed, replicated gradients count once. One wait for the device."""
    squares: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for parameter in parameters:
        if parameter.grad is not None:
            of_kind = squares[bool(getattr(parameter, "tensor_model_parallel", False))]
            of_kind += [torch.dot(run, run) for run in parameter.grad.reshape(-1).split(SUMMED)]
    device = next(run.device for runs in squares.values() for run in runs)
    totals = [torch.stack(runs).double().sum() if runs else torch.zeros((), dtype=torch.float64) for runs in squares.values()]
    replicated, sharded = (total.to(device) for total in totals)
    total = float(replicated + state.sum_over_tensor(sharded))
    return math.sqrt(total) if math.isfinite(total) else math.inf
