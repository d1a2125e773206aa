"""Define linear and embedding layers whose weights are sharded over a tensor-parallel group.

Each takes the full sizes and its group (the linear ones through the placement of token rows), and
holds only its own slice. A column-parallel layer followed by a row-parallel one costs one
all-reduce forward and one backward, or its counterpart under sequence parallelism.
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
    """Compute y = activation(x W^T, b) with the rows of W [out, in] sharded: x [N, in] as placed ->
    all rows [N, out / ranks].
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
    """Compute y = x W^T with the columns of W [out, in] sharded: all rows [N, in / ranks] -> [N,
    out] as placed.

    There is no bias here: it is replicated, added once after the reduction, and belongs to the
    layer that adds it.
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
    """Embed token ids [Nt] -> [Nt, hidden], replicated, with the rows of the [padded vocabulary,
    hidden] table sharded.

    The same weight is the word head's decoder, whose logits are therefore sharded in the same way.
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
