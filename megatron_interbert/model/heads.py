"""Heads on top of the streams: masked words, masked regions, matching, choice."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_interbert.config import ModelConfig
from megatron_interbert.parallel.collectives import copy_to_group, group_rank, group_size


class Transform(nn.Module):
    """Linear, GELU, LayerNorm: [M, H] -> [M, H], the first half of both masked heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.dense(hidden)))


class WordHead(nn.Module):
    """MSM: [M, H] -> logits [M, padded vocabulary / ranks], decoder tied to the word embedding.

    Columns of the padding hold -inf, so that they have no probability and no gradient.
    """

    def __init__(self, config: ModelConfig, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.group = group
        self.transform = Transform(config)
        columns = config.padded_vocab_size // group_size(group)
        self.bias = nn.Parameter(torch.empty(columns))
        self.words_here = max(0, min(columns, config.vocab_size - columns * group_rank(group)))

    def forward(self, hidden: torch.Tensor, word_embedding: torch.Tensor) -> torch.Tensor:
        transformed = copy_to_group(self.transform(hidden), self.group)
        logits = F.linear(transformed, word_embedding, self.bias).float()
        padding = torch.arange(logits.shape[1], device=logits.device) >= self.words_here
        return logits.masked_fill(padding, float("-inf"))


class RegionHead(nn.Module):
    """MRM: [M, H] -> class logits [M, classes]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.num_classes)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden))


class SentenceHead(nn.Module):
    """Text classification as in BERT: [CLS] state [B, H], Linear, tanh, dropout, Linear -> [B, labels]."""

    def __init__(self, config: ModelConfig, labels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, labels)
        self.dropout = config.hidden_dropout

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        return self.output(F.dropout(torch.tanh(self.dense(first)), self.dropout, self.training))


class Pooler(nn.Module):
    """First token of each sequence, Linear, ReLU: [B, H] -> [B, P]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooled_size)

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        return F.relu(self.dense(first))
