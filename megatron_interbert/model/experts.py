"""Compute a layer's MLP by experts: each token by the one that each prototype chooses for it.

Legend: N rows of the tensor-parallel group, n of this rank, H hidden size, F inner size, E experts,
k prototypes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.kernels.gather import gather_rows
from megatron_interbert.kernels.grouped import grouped_linear
from megatron_interbert.model.router import Choice, Router, RouterReport, count
from megatron_interbert.model.routing_groups import (
    RoutedTokens,
    RoutingGroups,
    balance_of,
    within_capacity,
)
from megatron_interbert.parallel.collectives import group_rank, start_gather
from megatron_interbert.parallel.exchange import Exchange
from megatron_interbert.parallel.state import ParallelState


class ExpertLinear(nn.Module):
    """Multiply rows by the matrix of their expert, and add its bias if it has one: x [rows, in],
    sorted by expert with `counts` rows for each -> [rows, out].
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        state: ParallelState,
        kernels: Kernels,
        bias: bool,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = state.expert_parameter(experts, out_features, in_features)
        self.bias = state.expert_parameter(experts, out_features) if bias else None

    def forward(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        by = (self.kernels.grouped, self.kernels.products)
        return grouped_linear(x, self.weight, self.bias, counts, *by)


class ExpertMlps(nn.Module):
    """Hold the experts of this rank, GELU MLPs without a last bias: all experts of a layer share
    one, which ResidualNorm adds.
    """

    def __init__(
        self, experts: int, hidden: int, ffn: int, state: ParallelState, kernels: Kernels
    ) -> None:
        super().__init__()
        self.up = ExpertLinear(experts, hidden, ffn, state, kernels, bias=True)
        self.down = ExpertLinear(experts, ffn, hidden, state, kernels, bias=False)

    def forward(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return self.down(F.gelu(self.up(x, counts)), counts)


class Experts(nn.Module):
    """Take the place of `Mlp`: [N, H] -> [N, H] as placed, and a report of the routing.

    Each tensor-parallel rank routes and sends only its own part of the rows. Experts are whole; the
    ranks of the expert-parallel group divide them.
    """

    def __init__(self, config: ModelConfig, state: ParallelState, kernels: Kernels) -> None:
        super().__init__()
        self.placement = state.placement
        self.group = state.expert_group
        self.count = config.experts
        self.router = Router(config.hidden_size, config.experts, config.prototypes, state.placement)
        here = config.experts // state.expert_size
        self.experts = ExpertMlps(here, config.hidden_size, config.ffn_hidden_size, state, kernels)

    def forward(
        self, x: torch.Tensor, tokens: RoutedTokens | None = None
    ) -> tuple[torch.Tensor, RouterReport]:
        """Compute the rows of x, as placed; `tokens` describes all of them, by default as real
        tokens without routing groups.
        """
        given = len(x)
        x = self._own_rows(x)
        ranks = self.placement.ranks
        tokens = tokens or RoutedTokens(given * (ranks if self.placement.shared else 1))
        first = len(x) * group_rank(self.placement.group)
        own = slice(first, first + len(x))

        choice = self.router(x)
        row = torch.arange(own.start, own.stop, device=x.device)
        real = (row < tokens.real)[:, None]
        kept = real.expand_as(choice.expert)
        balance = choice.weight.new_zeros(())
        if tokens.groups is not None:
            fits, balance = self._in_groups(choice, tokens.groups, own)
            kept = kept & fits

        report = RouterReport(balance, self._figures(choice, real, kept, balance))
        y = self._compute(x, choice, kept)
        if ranks > 1 and not self.placement.shared:
            y = self.placement.join(y)[:given]

        return y, report

    def _own_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return this tensor-parallel rank's part of the rows, of equal length on all ranks."""
        ranks = self.placement.ranks
        if ranks == 1 or self.placement.shared:
            return x

        return self.placement.split(F.pad(x, (0, 0, 0, -len(x) % ranks)))

    def _in_groups(
        self, choice: Choice, groups: RoutingGroups, own: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which choices [n, k] of this rank's rows fit, and its share of the balance."""
        everyone = self._of_all_ranks(choice.expert)
        groups = groups.padded(len(everyone))
        fits = within_capacity(everyone, groups, self.count)

        return fits[own], balance_of(everyone, choice, groups, own, self.count)

    def _of_all_ranks(self, expert: torch.Tensor) -> torch.Tensor:
        """Return the choices [N, k] of all tensor-parallel ranks."""
        if self.placement.ranks == 1:
            return expert

        everyone, work = start_gather(expert, self.placement.group)
        work.wait()

        return everyone

    def _compute(self, x: torch.Tensor, choice: Choice, kept: torch.Tensor) -> torch.Tensor:
        """Return the sum of each row's experts, weighted by their probabilities: [n, H]; a choice
        that is not `kept` counts as 0.
        """
        tokens, prototypes = choice.expert.shape
        chosen = choice.expert.masked_fill(~kept, self.count).flatten()
        by_expert = chosen.argsort(stable=True)
        by_token = by_expert.argsort()
        exchange = Exchange(count(chosen, self.count + 1)[:-1], self.group, len(chosen))

        copies = x[:, None].expand(-1, prototypes, -1).flatten(0, 1)
        rows = gather_rows(copies, by_expert, by_token)
        results = self._by_experts(rows, exchange)
        results = gather_rows(results, by_token, by_expert).view(tokens, prototypes, x.shape[1])

        return (results * choice.weight.to(x.dtype)[:, :, None]).sum(1)

    def _by_experts(self, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        """Return the experts' results for rows that are sorted by expert, and 0 for those at the
        end that no expert takes.
        """
        taken = exchange.mine
        results = exchange.back(self.experts(exchange.there(rows[:taken]), exchange.held))

        return F.pad(results, (0, 0, 0, len(rows) - taken))

    def _figures(
        self, choice: Choice, real: torch.Tensor, kept: torch.Tensor, balance: torch.Tensor
    ) -> torch.Tensor:
        """Return the figures of a RouterReport."""
        with torch.no_grad():
            chosen = choice.expert.masked_fill(~real, self.count)
            loads = count(chosen, self.count + 1)[:-1].float()
            dropped = (real & ~kept).sum()
            entropy = torch.special.entr(choice.probabilities).sum((1, 2))
            sums = [dropped, (entropy * real[:, 0]).sum(), balance, real.sum()]

            return torch.cat([loads, torch.stack([value.float() for value in sums])])
