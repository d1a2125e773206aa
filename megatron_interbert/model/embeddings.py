"""Text and region embeddings: ids and stored features to the first hidden states of both token kinds."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_interbert.config import ModelConfig
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.parallel.layers import VocabParallelEmbedding


class TextEmbedding(nn.Module):
    """word + position + type, LayerNorm, dropout: ids [Nt] -> [Nt, H]."""

    def __init__(self, config: ModelConfig, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.word = VocabParallelEmbedding(config.padded_vocab_size, config.hidden_size, group)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = config.hidden_dropout

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        embedded = self.word(ids) + self.position(positions) + self.token_type(types)
        return F.dropout(self.norm(embedded), self.dropout, self.training)


class ImageEmbedding(nn.Module):
    """Linear(feature) + Linear(location), LayerNorm, dropout: [IMG] and regions -> [Ni, H].

    Hidden regions are zeroed here, and [IMG] is the mean of a sample's region features as they then stand (zeros count).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.feature = nn.Linear(config.feature_dim, config.hidden_size)
        self.location = nn.Linear(5, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = config.hidden_dropout

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        features = image_features(batch).to(self.feature.weight.dtype)
        embedded = self.feature(features) + self.location(batch.locations.to(features.dtype))
        return F.dropout(self.norm(embedded), self.dropout, self.training)


def image_features(batch: PackedBatch) -> torch.Tensor:
    """float32 [Ni, F]: the features of all image tokens, [IMG] included, with hidden regions zeroed."""
    regions = batch.features.float().index_fill(0, batch.hidden_regions, 0.0)
    means = torch.segment_reduce(regions, "mean", lengths=batch.region_counts)  # no atomics: the same bits on every rank
    result = regions.new_empty(len(batch.locations), regions.shape[1])
    result.index_copy_(0, batch.summary_rows, means)
    return result.index_copy_(0, batch.region_rows, regions)
