"""The one transformer layer, used by the interaction module and both streams: post-LN BERT over
packed tokens.

Legend: N tokens of all samples, H hidden. With sequence parallelism a rank's x holds its part of
the N rows (parallel/placement.py).
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.kernels.sequences import Sequences
from megatron_interbert.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_interbert.parallel.placement import Placement
from megatron_interbert.parallel.rng import RandomStreams


class SelfAttention(nn.Module):
    """One QKV projection, attention within each sequence, output projection without its bias: [N,
    H] -> [N, H].

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
        """Attend over projected tokens [N, 3 H / ranks] -> [N, H / ranks]; the output projection is
        not in it.
        """
        qkv = qkv.view(len(qkv), -1, 3, self.head_size)
        p = self.dropout if self.training else 0.0
        if p > 0:  # heads are sharded: each rank drops for itself
            with self.streams.sharded():
                attended = self.kernels.attention(qkv, sequences, p)
        else:
            attended = self.kernels.attention(qkv, sequences, p)

        return attended.flatten(1)


class Mlp(nn.Module):
    """GELU MLP without its last bias: [N, H] -> [N, H].

    A layer takes any module of this signature in its place.
    """

    def __init__(self, hidden: int, ffn: int, placement: Placement, kernels: Kernels) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(
            hidden, ffn, placement, kernels.products, activation=kernels.bias_gelu
        )
        self.down = RowParallelLinear(ffn, hidden, placement, kernels.products)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class ResidualNorm(nn.Module):
    """LayerNorm(residual + dropout(x + linear_bias)); linear_bias is that of the row-parallel layer
    that made x.
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

        # Rows that are shared out are not those of the other ranks: each drops for itself.
        with self.streams.sharded() if self.placement.shared and p > 0 else nullcontext():
            return self.kernels.dropout_add_norm(
                x, linear_bias, residual, weight, bias, p, self.eps
            )


class TransformerLayer(nn.Module):
    """x = norm(x + attention(x)).

    X = norm(x + mlp(x)), over the tokens [N, H] of packed sequences.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        ffn: int,
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
        self.mlp = Mlp(hidden, ffn, placement, kernels)
        self.mlp_norm = ResidualNorm(hidden, hidden_dropout, eps, placement, kernels, streams)

    def forward(
        self, x: torch.Tensor, sequences: Sequences, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give all tokens, or only those of `rows` [R] (each at most once), which still attend to
        all of their sequence.
        """
        attended = self.attention.attend(self.attention.qkv(x), sequences)
        if rows is not None:
            attended = attended.index_select(0, rows)
            x = self.placement.select(x, rows)

        return self.after_attention(attended, x)

    def after_attention(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Give the layer from its attention's result [N, H / ranks], before the output projection,
        on.
        """
        x = self.attention_norm(self.attention.output(attended), x)
        return self.mlp_norm(self.mlp(x), x)


class TransformerStack(nn.Module):
    """Layers one after another; `recompute` keeps only their inputs for the backward pass.

    Rows are filled up to a multiple of `row_multiple`, and of the ranks that share them out.
    """

    def __init__(
        self,
        layers: list[TransformerLayer],
        placement: Placement,
        streams: RandomStreams,
        recompute: bool,
        row_multiple: int = 1,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.multiple = math.lcm(row_multiple, placement.ranks if placement.shared else 1)
        self.placement = placement
        self.streams = streams
        self.recompute = recompute

    def forward(
        self, x: torch.Tensor, sequences: Sequences, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the stack: [N, H] -> [N, H], or [R, H]: the last layer is computed only where `rows`
        say that it is read.
        """
        if rows is not None and not len(self.layers):
            return x.index_select(0, rows)

        asked = len(x) if rows is None else len(rows)
        if self.multiple > 1:
            x, sequences, rows = self._filled(x, sequences, rows)
        if self.placement.shared:
            x = self.placement.split(x)

        for number, layer in enumerate(self.layers, 1):
            inputs = (x, sequences, rows if number == len(self.layers) else None)
            x = (
                self.streams.recompute(layer, *inputs)
                if self.recompute and self.training
                else layer(*inputs)
            )

        if self.placement.shared:
            x = self.placement.join(x)

        return x[:asked] if self.multiple > 1 else x

    def _filled(
        self, x: torch.Tensor, sequences: Sequences, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, Sequences, torch.Tensor | None]:
        """Add one more sequence, of as many empty tokens as are missing, and fill `rows` with its
        first.

        Nothing reads the empty tokens, so they get no gradient and give none.
        """
        tokens = len(x)
        more = self.multiple - tokens % self.multiple  # at least one: no sequence is ever empty
        x = F.pad(x, (0, 0, 0, more))
        offsets = F.pad(sequences.offsets, (0, 1), value=tokens + more)
        if rows is not None:
            rows = torch.cat([rows, rows.new_full((-len(rows) % self.multiple,), tokens)])

        return x, Sequences(offsets, max(sequences.longest, more)), rows
