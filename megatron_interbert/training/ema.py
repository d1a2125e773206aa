"""An average of the weights over the steps, as it is evaluated after finetuning.

Sharded as ZeRO shards the weights.
"""

from collections.abc import Iterable

import torch


class AveragedWeights:
    """Exponential average of the fp32 weights that a rank updates: average = decay average + (1 -
    decay) weight, after each step.

    In the first steps the decay is (1 + n) / (10 + n) where that is smaller, so that the first
    weights do not linger.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        # by the identity of the tensor that Adam updates
        self._averages: dict[int, torch.Tensor] = {}

    def average_of(self, weights: torch.Tensor) -> torch.Tensor:
        """Give the flat average of a tensor that Adam updates; begins as a copy of it."""
        if id(weights) not in self._averages:
            self._averages[id(weights)] = weights.detach().reshape(-1).float().clone()
        return self._averages[id(weights)]

    @torch.no_grad()
    def update(self, step: int, tensors: Iterable[torch.Tensor]) -> None:
        """After optimizer step `step` (1 is the first): all tensors that Adam updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = list(tensors)
        averages = [self.average_of(tensor) for tensor in weights]
        flat = [tensor.detach().reshape(-1).float() for tensor in weights]

        torch._foreach_lerp_(averages, flat, 1 - decay)
