"""Embed text and regions: token ids and stored features become the first hidden states."""

import torch
import torch.distributed as dist
from torch import nn

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.parallel.layers import VocabParallelEmbedding


def empty_embedding(rows: int, columns: int) -> nn.Embedding:
    """Build an embedding without drawing weights: for a model without memory torch would import its
    compiler for that, which takes two seconds.
    """
    return nn.Embedding.from_pretrained(torch.empty(rows, columns), freeze=False)


class TextEmbedding(nn.Module):
    """Embed text tokens by word + position + type, LayerNorm and dropout: ids [Nt] -> [Nt, H]."""

    def __init__(
        self, config: ModelConfig, group: dist.ProcessGroup | None, kernels: Kernels
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.word = VocabParallelEmbedding(config.padded_vocab_size, config.hidden_size, group)
        self.position = empty_embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = empty_embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = config.hidden_dropout

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, types: torch.Tensor
    ) -> torch.Tensor:
        p = self.dropout if self.training else 0.0
        tables = (self.position.weight, self.token_type.weight)
        norm = self.norm

        return self.kernels.embed_text(
            self.word(ids), positions, types, *tables, norm.weight, norm.bias, p, norm.eps
        )


class ImageEmbedding(nn.Module):
    """Embed [IMG] and regions by Linear(feature) + Linear(location), LayerNorm, dropout: [Ni, H].

    The features of hidden regions are zeroed here, and that of [IMG] is the mean of a sample's
    region features after that (zeros count).
    """

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.feature = nn.Linear(config.feature_dim, config.hidden_size)
        self.location = nn.Linear(5, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = config.hidden_dropout

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        dtype = self.feature.weight.dtype
        features = image_features(batch, dtype, self.kernels)
        p = self.dropout if self.training else 0.0
        location = self.location
        norm = self.norm

        return self.kernels.embed_image(
            *(self.feature(features), batch.locations.to(dtype), location.weight, location.bias),
            *(norm.weight, norm.bias, p, norm.eps),
        )


def image_features(batch: PackedBatch, dtype: torch.dtype, kernels: Kernels) -> torch.Tensor:
    """Return the features of all image tokens [Ni, F], [IMG] included, hidden regions zeroed."""
    rows = (batch.region_rows, batch.summary_rows)
    return kernels.region_rows(
        batch.features, batch.hidden_regions, batch.region_counts, *rows, dtype
    )
