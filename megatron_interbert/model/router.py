"""Choose the experts of each token: one in each prototype, by a gate that is computed in float32.

The E experts are divided into k prototypes; each prototype sends a token to its most likely expert
(Yang et al., "M6-T: Exploring Sparse Expert Models and Beyond", arXiv 2105.15082). The choice is a
function of the token alone; what depends on other tokens is in model/routing_groups.py.

Legend: n tokens of this rank, H hidden size, E experts, k prototypes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megatron_interbert.parallel.collectives import copy_to_group
from megatron_interbert.parallel.placement import Placement


class RouterReport(NamedTuple):
    """Hold what one layer reports of its routing, of this rank's tokens.

    `balance` is a differentiable scalar: the sum over routing groups of E / k sum(share of the
    tokens x mean probability), averaged over prototypes; it is the number of groups if all experts
    have the same load. `figures` [E + 4]: tokens of each expert before any is dropped, then
    tokens dropped, entropy of the gate and balance, summed, and the number of tokens.
    """

    balance: torch.Tensor
    figures: torch.Tensor


class Choice(NamedTuple):
    """Hold the experts of tokens: int64 [n, k], their probabilities float32 [n, k], and those of
    all experts [n, k, E / k].
    """

    expert: torch.Tensor
    weight: torch.Tensor
    probabilities: torch.Tensor


class Router(nn.Module):
    """Choose the most likely expert of each prototype, the first one of equals."""

    def __init__(self, hidden: int, experts: int, prototypes: int, placement: Placement) -> None:
        super().__init__()
        self.prototypes = prototypes
        self.placement = placement
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x: torch.Tensor) -> Choice:
        """Choose for this rank's tokens x [n, H]."""
        weight = copy_to_group(self.weight, self.placement.group)  # others route other tokens
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), weight.to(wide))
        choices = len(self.weight) // self.prototypes
        probabilities = logits.view(-1, self.prototypes, choices).softmax(2)

        best = probabilities.argmax(2, keepdim=True)
        first = torch.arange(self.prototypes, device=x.device) * probabilities.shape[2]

        return Choice(
            best.squeeze(2) + first, probabilities.gather(2, best).squeeze(2), probabilities
        )


def count(numbers: torch.Tensor, length: int) -> torch.Tensor:
    """Count how often each of 0 .. `length` - 1 occurs: int64 [length]; waits for no device."""
    flat = numbers.flatten()
    return flat.new_zeros(length).scatter_add_(0, flat, torch.ones_like(flat))
