"""Linear and embedding layers whose weights are shared out over a tensor-parallel group.

Each takes the full sizes and its group (the linear ones by the placement of token rows in it), and
holds only its own slice. A column-parallel layer followed by a row-parallel one costs one all-
reduce forward and one backward, or what stands for it where rows are shared out.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_interbert.parallel.collectives import group_rank, group_size, reduce_from_group
from megatron_interbert.parallel.placement import Placement, Products

Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ColumnParallelLinear(nn.Module):
    """y = activation(x W^T, b) with the rows of W [out, in] shared out: [N, in] placed so -> all of
    [N, out / ranks].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        placement: Placement,
        products: Products,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        self.placement = placement
        self.products = products
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_features // placement.ranks, in_features))
        self.bias = nn.Parameter(torch.empty(out_features // placement.ranks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation is None:
            return self.placement.column_linear(x, self.weight, self.bias, self.products)
        return self.activation(
            self.placement.column_linear(x, self.weight, None, self.products), self.bias
        )


class RowParallelLinear(nn.Module):
    """y = x W^T with the columns of W [out, in] shared out: all of [N, in / ranks] -> [N, out]
    placed so.

    It has no bias: that is replicated, is added once after the reduction, and lives in the layer
    that adds it.
    """

    def __init__(
        self, in_features: int, out_features: int, placement: Placement, products: Products
    ) -> None:
        super().__init__()
        self.placement = placement
        self.products = products
        self.weight = nn.Parameter(torch.empty(out_features, in_features // placement.ranks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.placement.reduce(self.products.linear(x, self.weight))


class VocabParallelEmbedding(nn.Module):
    """Rows of a [padded vocabulary, hidden] table shared out; token ids [Nt] -> [Nt, hidden]
    replicated.

    The same weight serves as the decoder of the word head, so its logits are shared out alike.
    """

    def __init__(
        self, padded_vocab_size: int, hidden_size: int, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.group = group
        self.rows = padded_vocab_size // group_size(group)
        self.first = self.rows * group_rank(group)
        self.weight = nn.Parameter(torch.empty(self.rows, hidden_size))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if group_size(self.group) == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.first
        elsewhere = (local < 0) | (local >= self.rows)
        embedded = F.embedding(local.masked_fill(elsewhere, 0), self.weight)

        return reduce_from_group(embedded.masked_fill(elsewhere[:, None], 0.0), self.group)
