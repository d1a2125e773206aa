"""Define the transformer layer of the interaction module and both streams: post-LN BERT over packed
tokens.

Legend: N tokens of all samples, H hidden size. With sequence parallelism a rank's x holds its part
of the N rows (parallel/placement.py).
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.kernels.sequences import Sequences
from megatron_interbert.model.router import RouterReport
from megatron_interbert.model.routing_groups import RoutedTokens, RoutingRule, describe_tokens
from megatron_interbert.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_interbert.parallel.placement import Placement
from megatron_interbert.parallel.rng import RandomStreams


class SelfAttention(nn.Module):
    """Hold the QKV projection, attention within each sequence, and the output projection, whose
    bias ResidualNorm adds.

    The rows of `qkv` are ordered by head (q, k, v of head 0, then of head 1, ..), so that a slice
    holds whole heads.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        dropout: float,
        placement: Placement,
        kernels: Kernels,
        streams: RandomStreams,
    ) -> None:
        super().__init__()
        self.head_size = hidden // heads
        self.dropout = dropout
        self.kernels = kernels
        self.streams = streams
        self.qkv = ColumnParallelLinear(hidden, 3 * hidden, placement, kernels.products)
        self.output = RowParallelLinear(hidden, hidden, placement, kernels.products)

    def attend(self, qkv: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """Attend over projected tokens: [N, 3 H / ranks] -> [N, H / ranks], before the output
        projection.
        """
        qkv = qkv.view(len(qkv), -1, 3, self.head_size)
        p = self.dropout if self.training else 0.0
        if p > 0:  # heads are sharded, so each rank draws its own dropout
            with self.streams.sharded():
                attended = self.kernels.attention(qkv, sequences, p)
        else:
            attended = self.kernels.attention(qkv, sequences, p)

        return attended.flatten(1)


class Mlp(nn.Module):
    """Apply a GELU MLP without its last bias, which ResidualNorm adds: [N, H] -> [N, H].

    Experts can take its place in a layer (model/experts.py).
    """

    def __init__(self, hidden: int, ffn: int, placement: Placement, kernels: Kernels) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(
            hidden, ffn, placement, kernels.products, activation=kernels.bias_gelu
        )
        self.down = RowParallelLinear(ffn, hidden, placement, kernels.products)

    def forward(
        self, x: torch.Tensor, tokens: RoutedTokens | None = None
    ) -> tuple[torch.Tensor, None]:
        """Return the result, and None: there is no routing to report."""
        return self.down(self.up(x)), None


class ResidualNorm(nn.Module):
    """Compute LayerNorm(residual + dropout(x + linear_bias)).

    `linear_bias` belongs to the row-parallel layer that computed x.
    """

    def __init__(
        self,
        hidden: int,
        dropout: float,
        eps: float,
        placement: Placement,
        kernels: Kernels,
        streams: RandomStreams,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.eps = eps
        self.placement = placement
        self.kernels = kernels
        self.streams = streams
        self.linear_bias = nn.Parameter(torch.empty(hidden))
        self.weight = nn.Parameter(torch.empty(hidden))
        self.bias = nn.Parameter(torch.empty(hidden))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        p = self.dropout if self.training else 0.0
        linear_bias, weight, bias = self.placement.parameters(
            self.linear_bias, self.weight, self.bias
        )

        # Ranks that split the rows hold different ones, so each draws its own dropout.
        with self.streams.sharded() if self.placement.shared and p > 0 else nullcontext():
            return self.kernels.dropout_add_norm(
                x, linear_bias, residual, weight, bias, p, self.eps
            )


class TransformerLayer(nn.Module):
    """Compute x = norm(x + attention(x)); x = norm(x + mlp(x)) over packed tokens [N, H].

    `mlp` is the layer's `Mlp` or `Experts`.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        mlp: nn.Module,
        hidden_dropout: float,
        attention_dropout: float,
        eps: float,
        placement: Placement,
        kernels: Kernels,
        streams: RandomStreams,
    ) -> None:
        super().__init__()
        self.placement = placement
        self.attention = SelfAttention(
            hidden, heads, attention_dropout, placement, kernels, streams
        )
        self.attention_norm = ResidualNorm(hidden, hidden_dropout, eps, placement, kernels, streams)
        self.mlp = mlp
        self.mlp_norm = ResidualNorm(hidden, hidden_dropout, eps, placement, kernels, streams)

    def forward(
        self,
        x: torch.Tensor,
        sequences: Sequences,
        rows: torch.Tensor | None = None,
        tokens: RoutedTokens | None = None,
    ) -> tuple[torch.Tensor, RouterReport | None]:
        """Run the layer for all tokens [N, H], or only those of `rows` [R] (each at most once),
        which still attend to their whole sequence: [R, H]. `tokens` describes them for experts,
        whose report comes second.
        """
        attended = self.attention.attend(self.attention.qkv(x), sequences)
        if rows is not None:
            attended = attended.index_select(0, rows)
            x = self.placement.select(x, rows)

        return self.after_attention(attended, x, tokens)

    def after_attention(
        self, attended: torch.Tensor, x: torch.Tensor, tokens: RoutedTokens | None = None
    ) -> tuple[torch.Tensor, RouterReport | None]:
        """Run the rest of the layer after `attend`: its result [N, H / ranks] and x -> [N, H], with
        the report of experts.
        """
        x = self.attention_norm(self.attention.output(attended), x)
        y, report = self.mlp(x, tokens)

        return self.mlp_norm(y, x), report


class TransformerStack(nn.Module):
    """Run `depth` layers one after another; `recompute` keeps only their inputs for the backward
    pass.

    One layer given for several is used `depth` times. Rows are padded to a multiple of
    `row_multiple` and of the ranks that split them. `rule` limits and balances the experts.
    """

    def __init__(
        self,
        layers: list[TransformerLayer],
        placement: Placement,
        streams: RandomStreams,
        recompute: bool,
        row_multiple: int = 1,
        depth: int | None = None,
        rule: RoutingRule | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.depth = len(layers) if depth is None else depth
        self.rule = rule or RoutingRule()
        self.multiple = math.lcm(row_multiple, placement.ranks if placement.shared else 1)
        self.placement = placement
        self.streams = streams
        self.recompute = recompute

    @property
    def in_order(self) -> list[TransformerLayer]:
        """Return the layers in the order of their use."""
        return [self.layers[number % len(self.layers)] for number in range(self.depth)]

    def forward(
        self,
        x: torch.Tensor,
        sequences: Sequences,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[RouterReport, ...]]:
        """Run the stack: [N, H] -> [N, H], or [R, H] with `rows` [R], for which alone the last
        layer is then computed. The reports of its experts come second.
        """
        if rows is not None and not self.depth:
            return x.index_select(0, rows), ()

        reports: list[RouterReport] = []
        real = len(x)
        asked = real if rows is None else len(rows)
        samples = len(sequences)
        if self.multiple > 1 or not real:
            x, sequences, rows = self._filled(x, sequences, rows)

        everywhere = torch.arange(len(x), device=x.device)
        tokens = self._describe(sequences, everywhere, real, samples)
        if self.placement.shared:
            x = self.placement.split(x)

        for number, layer in enumerate(self.in_order, 1):
            inputs = (x, sequences, None, tokens)
            if rows is not None and number == self.depth:
                inputs = (x, sequences, rows, self._describe(sequences, rows, asked, samples))

            x, report = (
                self.streams.recompute(layer, *inputs)
                if self.recompute and self.training
                else layer(*inputs)
            )
            if report is not None:
                reports.append(report)

        if self.placement.shared:
            x = self.placement.join(x)

        return x[:asked], tuple(reports)

    def _describe(
        self, sequences: Sequences, rows: torch.Tensor, real: int, samples: int
    ) -> RoutedTokens:
        """Describe rows for experts, which limit and balance nothing outside training."""
        rule = self.rule if self.training else RoutingRule()
        return describe_tokens(rule, sequences, rows, real, samples)

    def _filled(
        self, x: torch.Tensor, sequences: Sequences, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, Sequences, torch.Tensor | None]:
        """Add a sequence of as many empty tokens as are missing, and pad `rows` with its first.

        Nothing reads the empty tokens, so no gradient flows through them.
        """
        tokens = len(x)
        more = self.multiple - tokens % self.multiple  # at least one: no sequence is ever empty
        x = F.pad(x, (0, 0, 0, more))
        offsets = F.pad(sequences.offsets, (0, 1), value=tokens + more)
        if rows is not None:
            rows = torch.cat([rows, rows.new_full((-len(rows) % self.multiple,), tokens)])

        return x, Sequences(offsets, max(sequences.longest, more)), rows
