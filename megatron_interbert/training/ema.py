"""Keep an exponential moving average (EMA) of the weights, for evaluation in finetuning.

It is sharded as ZeRO shards the weights.
"""

from collections.abc import Iterable

import torch


class AveragedWeights:
    """Hold the moving average of the fp32 weights that a rank updates; after each step,
    average = decay * average + (1 - decay) * weight.

    At step n the decay is at most (1 + n) / (10 + n), so that the initial weights fade quickly.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        # by id() of the tensor that Adam updates
        self._averages: dict[int, torch.Tensor] = {}

    def average_of(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the flat average of a tensor that Adam updates; it starts as a copy."""
        if id(weights) not in self._averages:
            self._averages[id(weights)] = weights.detach().reshape(-1).float().clone()
        return self._averages[id(weights)]

    @torch.no_grad()
    def update(self, step: int, tensors: Iterable[torch.Tensor]) -> None:
        """Average in all tensors that Adam updates, after optimizer step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))

        for weights in tensors:
            self.average_of(weights).lerp_(weights.detach().reshape(-1).float(), 1 - decay)
