"""The one transformer layer, used by the interaction module and both streams: post-LN BERT over packed tokens.

Legend: N tokens of all samples, H hidden, T tensor-parallel ranks.
"""

import torch
import torch.distributed as dist
from torch import nn

from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_interbert.parallel.rng import RandomStreams


class SelfAttention(nn.Module):
    """One QKV projection, attention within each sequence, output projection without its bias: [N, H] -> [N, H].

    The rows of `qkv` are ordered by head (q, k, v of head 0, then of head 1, ..), so that a slice holds whole heads.
    """

    def __init__(
        self, hidden: int, heads: int, dropout: float, group: dist.ProcessGroup | None, kernels: Kernels, streams: RandomStreams
    ) -> None:
        super().__init__()
        self.head_size, self.dropout, self.kernels, self.streams = hidden // heads, dropout, kernels, streams
        self.qkv = ColumnParallelLinear(hidden, 3 * hidden, group)
        self.output = RowParallelLinear(hidden, hidden, group)

    def attend(self, qkv: torch.Tensor, offsets: torch.Tensor, max_length: int) -> torch.Tensor:
        """Attention over projected tokens [N, 3 H / ranks] -> [N, H / ranks], before the output projection."""
        q, k, v = qkv.view(len(qkv), -1, 3, self.head_size).unbind(dim=2)
        p = self.dropout if self.training else 0.0
        if p > 0:  # heads are sharded: each rank drops for itself
            with self.streams.sharded():
                attended = self.kernels.attention(q, k, v, offsets, max_length, p)
        else:
            attended = self.kernels.attention(q, k, v, offsets, max_length, p)
        return attended.flatten(1)


class Mlp(nn.Module):
    """GELU MLP without its last bias: [N, H] -> [N, H]. A layer takes any module of this signature in its place."""

    def __init__(self, hidden: int, ffn: int, group: dist.ProcessGroup | None, kernels: Kernels) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(hidden, ffn, group, activation=kernels.bias_gelu)
        self.down = RowParallelLinear(ffn, hidden, group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class ResidualNorm(nn.Module):
    """LayerNorm(residual + dropout(x + linear_bias)); linear_bias is that of the row-parallel layer that made x."""

    def __init__(self, hidden: int, dropout: float, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.dropout, self.eps, self.kernels = dropout, eps, kernels
        self.linear_bias = nn.Parameter(torch.empty(hidden))
        self.weight = nn.Parameter(torch.empty(hidden))
        self.bias = nn.Parameter(torch.empty(hidden))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        p = self.dropout if self.training else 0.0
        return self.kernels.dropout_add_norm(x, self.linear_bias, residual, self.weight, self.bias, p, self.eps)


class TransformerLayer(nn.Module):
    """x = norm(x + attention(x)); x = norm(x + mlp(x)), over [N, H] with sequence offsets [B+1]."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        ffn: int,
        hidden_dropout: float,
        attention_dropout: float,
        eps: float,
        group: dist.ProcessGroup | None,
        kernels: Kernels,
        streams: RandomStreams,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden, heads, attention_dropout, group, kernels, streams)
        self.attention_norm = ResidualNorm(hidden, hidden_dropout, eps, kernels)
        self.mlp = Mlp(hidden, ffn, group, kernels)
        self.mlp_norm = ResidualNorm(hidden, hidden_dropout, eps, kernels)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor, max_length: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        """All tokens, or only those of `rows` [R] (each at most once), which still attend to all of their sequence."""
        attended = self.attention.attend(self.attention.qkv(x), offsets, max_length)
        if rows is not None:
            attended, x = attended.index_select(0, rows), x.index_select(0, rows)
        return self.after_attention(attended, x)

    def after_attention(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The layer from its attention's result [N, H / ranks], before the output projection, on."""
        x = self.attention_norm(self.attention.output(attended), x)
        return self.mlp_norm(self.mlp(x), x)


class TransformerStack(nn.Module):
    """Layers one after another; `recompute` keeps only their inputs for the backward pass."""

    def __init__(self, layers: list[TransformerLayer], streams: RandomStreams, recompute: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.streams, self.recompute = streams, recompute

    def forward(self, x: torch.Tensor, offsets: torch.Tensor, max_length: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        """[N, H] -> [N, H], or [R, H]: the last layer is computed only where `rows` say that it is read."""
        if rows is not None and not len(self.layers):
            return x.index_select(0, rows)
        for number, layer in enumerate(self.layers, 1):
            inputs = (x, offsets, max_length, rows if number == len(self.layers) else None)
            x = self.streams.recompute(layer, *inputs) if self.recompute and self.training else layer(*inputs)
        return x
