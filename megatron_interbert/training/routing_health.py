"""Watch how routers load their experts, and weigh the loss that balances them.

What a layer reports is defined in model/router.py (RouterReport).
"""

import math
from typing import Any

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.parallel.state import ParallelState

SUMS = 4  # figures after the loads of experts: dropped, entropy, balance, tokens


class RoutingHealth:
    """Add up what the layers of a model report between two log lines."""

    def __init__(
        self,
        config: TrainConfig,
        sizes: ModelConfig,
        state: ParallelState,
        text_only: bool = False,
    ) -> None:
        self.config = config
        self.prototypes = sizes.prototypes
        self.state = state
        self.names = layers_with_experts(sizes, text_only)
        self.coefficient = getattr(config, "balance_coefficient", 0.0)
        self.start_window()

    def start_window(self) -> None:
        """Begin anew."""
        self._figures: torch.Tensor | None = None

    def loss(self, output: Any) -> torch.Tensor | float:
        """Take the report of a micro-batch, and return its share of the step's loss for balance:
        the coefficient times the mean over routing groups, summed over layers.
        """
        if output.router_figures is None:
            return 0.0

        figures = output.router_figures
        self._figures = figures if self._figures is None else self._figures + figures
        if not self.coefficient:
            return 0.0

        return self.coefficient / self._groups * output.balance.sum()

    @property
    def _groups(self) -> float:
        """Return the number of routing groups in a step."""
        return self.config.global_batch_size / self.config.routing_group

    def metrics(self, steps: int) -> dict[str, float]:
        """Return named metrics of each layer over the last `steps` steps of all ranks: the largest
        load of an expert over the mean load in its prototype, experts without a token, the share of
        tokens dropped, the mean entropy of the gate over its maximum and, if the load is balanced,
        the mean balance of a routing group (1 if all experts have the same load).
        """
        if self._figures is None:
            return {}

        summed = self.state.sum_over_tensor(self.state.sum_over_data(self._figures.double()))
        found = {}

        for name, figures in zip(self.names, summed.tolist(), strict=True):
            loads, (dropped, entropy, balance, tokens) = figures[:-SUMS], figures[-SUMS:]
            routed = max(tokens * self.prototypes, 1.0)
            choices = len(loads) // self.prototypes
            values = {
                "largest_load": max(loads) / max(tokens / choices, 1.0),
                "idle_experts": sum(load == 0 for load in loads),
                "dropped_share": dropped / routed,
                "gate_entropy": entropy / routed / max(math.log(choices), 1e-9),
            }
            if self.coefficient:
                values["balance"] = balance / (steps * self._groups)
            found |= {f"router/{name}/{key}": value for key, value in values.items()}

        return found

    @staticmethod
    def line(values: dict[str, float]) -> str:
        """Return the worst layer's load and the idle experts of all layers, as an addition to a log
        line; "" without experts.
        """
        loads = [value for name, value in values.items() if name.endswith("/largest_load")]
        if not loads:
            return ""

        idle = sum(value for name, value in values.items() if name.endswith("/idle_experts"))
        dropped = [value for name, value in values.items() if name.endswith("/dropped_share")]
        said = f" | experts: largest load {max(loads):.1f} x mean, {idle:.0f} idle"

        return f"{said}, {100 * max(dropped):.1f} % dropped" if max(dropped) else said


def layers_with_experts(sizes: ModelConfig, text_only: bool) -> list[str]:
    """Return the names of a model's layers that have experts, in the order of their use."""
    stacks = [stack for stack in sizes.STACKS if not (text_only and stack == "image")]

    return [
        f"{stack}_{number}"
        for stack in stacks
        if sizes.has_experts(stack)
        for number in range(getattr(sizes, f"{stack}_layers"))
    ]
