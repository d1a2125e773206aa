"""Choose the experts of each token: one in each prototype, by a gate in float32.

The E experts are divided into k prototypes; each prototype sends a token to its most likely expert
(Yang et al., "M6-T: Exploring Sparse Expert Models and Beyond", arXiv 2105.15082). The choice is a
function of the token alone. What depends on other tokens, the capacity of experts and the loss that
balances their load, is computed within routing groups: samples that are in one micro-batch whatever
the layout.

Legend: n tokens of this rank, N of its tensor-parallel group, E experts, k prototypes, G groups.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megatron_interbert.kernels.sequences import Sequences
from megatron_interbert.parallel.collectives import copy_to_group
from megatron_interbert.parallel.placement import Placement


@dataclass(frozen=True)
class RoutingRule:
    """Hold what limits and balances the load of experts in training.

    An expert takes at most ceil(T k / E x `capacity_factor`) of the T tokens of a routing group, in
    the order of their positions; 0: any number. A routing group is `group` consecutive samples of
    one data partition; the micro-batches of this rank take the samples of its `partitions`
    partitions in turn.
    """

    capacity_factor: float = 0.0
    balanced: bool = False
    group: int = 1
    partitions: int = 1

    @property
    def needs_groups(self) -> bool:
        """Check whether anything depends on the other tokens of a group."""
        return self.capacity_factor > 0 or self.balanced

    def group_of(self, sample: torch.Tensor) -> torch.Tensor:
        """Return the routing group of samples by their places in a micro-batch."""
        turn = sample // self.partitions
        return sample % self.partitions + self.partitions * (turn // self.group)

    def groups_in(self, samples: int) -> int:
        """Return how many routing groups a micro-batch has."""
        turns = -(-samples // self.partitions)
        return self.partitions * -(-turns // self.group)


@dataclass(frozen=True)
class Tokens:
    """Describe the rows [N] of a layer: those from `real` on are padding.

    With routing groups: the group of each row, which for padding is `groups`, the number of them,
    and its position among all tokens of the stack.
    """

    real: int
    group: torch.Tensor | None = None
    position: torch.Tensor | None = None
    groups: int = 0


def describe_tokens(
    rule: RoutingRule, sequences: Sequences, rows: torch.Tensor, real: int, samples: int
) -> Tokens:
    """Describe rows [N] of a stack, given by their positions, of which the first `real` belong to
    the first `samples` sequences.
    """
    if not rule.needs_groups:
        return Tokens(real)

    sample = torch.searchsorted(sequences.offsets[1:].contiguous(), rows.int(), right=True)
    groups = rule.groups_in(samples)
    padding = torch.arange(len(rows), device=rows.device) >= real

    return Tokens(real, rule.group_of(sample).masked_fill(padding, groups), rows, groups)


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


def within_capacity(
    expert: torch.Tensor, tokens: Tokens, experts: int, capacity_factor: float
) -> torch.Tensor:
    """Return which choices [N, k] of all tokens fit: in each group an expert takes the first ones
    by position.
    """
    prototypes = expert.shape[1]
    group = tokens.group
    of_group = count(group, tokens.groups + 1)
    capacity = (of_group.double() * prototypes / experts * capacity_factor).ceil().long()

    cell = (group[:, None] * experts + expert).flatten()
    position = tokens.position[:, None].expand_as(expert).flatten()
    order = (cell * (position.max() + 1) + position).argsort()

    of_cell = count(cell, (tokens.groups + 1) * experts)
    sorted_cell = cell[order]
    before = torch.arange(len(order), device=order.device)
    place = torch.empty_like(order)
    place[order] = before - (of_cell.cumsum(0) - of_cell)[sorted_cell]

    return (place < capacity[group].repeat_interleave(prototypes)).view_as(expert)


def balance_of(
    expert: torch.Tensor, choice: Choice, tokens: Tokens, own: slice, experts: int
) -> torch.Tensor:
    """Return this rank's share of a layer's `balance` (see RouterReport), from the experts [N, k]
    of all tokens and the probabilities of its own.
    """
    prototypes = expert.shape[1]
    group = tokens.group
    cells = count(group[:, None] * experts + expert, (tokens.groups + 1) * experts)
    shares = cells.view(-1, experts)[:-1].float()
    of_group = count(group, tokens.groups + 1)[:-1, None].clamp(min=1)

    sums = choice.probabilities.new_zeros(tokens.groups + 1, experts)
    sums = sums.index_add(0, group[own], choice.probabilities.flatten(1))[:-1]
    products = (shares / of_group * (sums / of_group)).sum()

    return products * experts / prototypes**2
