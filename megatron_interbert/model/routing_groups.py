"""Limit and balance the load of experts within routing groups. The samples of a group are always in
one micro-batch, so neither the tokens dropped nor the balance depend on the layout.

Legend: N tokens of a tensor-parallel group, n of this rank, E experts, k prototypes.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from megatron_interbert.kernels.sequences import Sequences
from megatron_interbert.model.router import Choice, count


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
class RoutingGroups:
    """Hold the routing group of each row [N] of a layer, which for padding is `count`, the number
    of groups; its position among all tokens of the stack; and what is limited and balanced.
    """

    of_row: torch.Tensor
    position: torch.Tensor
    count: int
    rule: RoutingRule

    def padded(self, rows: int) -> "RoutingGroups":
        """Extend the groups to `rows` rows by padding."""
        more = (0, rows - len(self.of_row))
        of_row = F.pad(self.of_row, more, value=self.count)

        return replace(self, of_row=of_row, position=F.pad(self.position, more))


@dataclass(frozen=True)
class RoutedTokens:
    """Describe the rows [N] of a layer: those from `real` on are padding; and their groups, if any
    matter.
    """

    real: int
    groups: RoutingGroups | None = None


def describe_tokens(
    rule: RoutingRule, sequences: Sequences, rows: torch.Tensor, real: int, samples: int
) -> RoutedTokens:
    """Describe rows [N] of a stack, given by their positions, of which the first `real` belong to
    the first `samples` sequences.
    """
    if not rule.needs_groups:
        return RoutedTokens(real)

    sample = torch.searchsorted(sequences.offsets[1:].contiguous(), rows.int(), right=True)
    number = rule.groups_in(samples)
    padding = torch.arange(len(rows), device=rows.device) >= real
    of_row = rule.group_of(sample).masked_fill(padding, number)

    return RoutedTokens(real, RoutingGroups(of_row, rows, number, rule))


def within_capacity(expert: torch.Tensor, groups: RoutingGroups, experts: int) -> torch.Tensor:
    """Return which choices [N, k] of all tokens fit: in each group an expert takes the first ones
    by position.
    """
    factor = groups.rule.capacity_factor
    if not factor:
        return torch.ones_like(expert, dtype=torch.bool)

    prototypes = expert.shape[1]
    of_group = count(groups.of_row, groups.count + 1)
    capacity = (of_group.double() * prototypes / experts * factor).ceil().long()

    # one cell for each expert in each group, sorted by position within
    cell = (groups.of_row[:, None] * experts + expert).flatten()
    position = groups.position[:, None].expand_as(expert).flatten()
    order = position.argsort()
    order = order[cell[order].argsort(stable=True)]

    of_cell = count(cell, (groups.count + 1) * experts)
    before = torch.arange(len(order), device=order.device)
    place = torch.empty_like(order)
    place[order] = before - (of_cell.cumsum(0) - of_cell)[cell[order]]

    return (place < capacity[groups.of_row].repeat_interleave(prototypes)).view_as(expert)


def balance_of(
    expert: torch.Tensor, choice: Choice, groups: RoutingGroups, own: slice, experts: int
) -> torch.Tensor:
    """Return this rank's share of a layer's `balance` (see RouterReport), from the experts [N, k]
    of all tokens and the probabilities of its own; 0 if the load is not balanced.
    """
    if not groups.rule.balanced:
        return choice.weight.new_zeros(())

    group = groups.of_row
    cells = count(group[:, None] * experts + expert, (groups.count + 1) * experts)
    shares = cells.view(-1, experts)[:-1].float()
    of_group = count(group, groups.count + 1)[:-1, None].clamp(min=1)

    sums = choice.probabilities.new_zeros(groups.count + 1, experts)
    sums = sums.index_add(0, group[own], choice.probabilities.flatten(1))[:-1]
    products = (shares / of_group * (sums / of_group)).sum()

    return products * experts / expert.shape[1] ** 2
