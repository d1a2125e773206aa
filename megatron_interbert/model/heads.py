"""Build the heads on top of the streams: masked words, masked regions, sentences, downstream tasks,
and poolers.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.kernels.products import Float8Products, PlainProducts
from megatron_interbert.parallel.collectives import copy_to_group, group_rank, group_size
from megatron_interbert.parallel.vocab_loss import VocabMath, vocab_parallel_loss


class Transform(nn.Module):
    """Apply Linear, GELU, LayerNorm, the first half of both masked heads: [M, H] -> [M, H]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(F.gelu(self.dense(hidden)))


class WordHead(nn.Module):
    """Predict masked words (MSM), with the decoder tied to the word embedding.

    States [M, H] and labels [M] give (losses [M], whether the most likely word is right [M]).
    Without labels it returns logits [M, padded vocabulary / ranks], -inf in padding columns.
    """

    def __init__(
        self, config: ModelConfig, group: dist.ProcessGroup | None, kernels: Kernels
    ) -> None:
        super().__init__()
        self.group = group
        # never in 8 bits: the logits of words are close to each other
        products = PlainProducts if kernels.products is Float8Products else kernels.products
        self.math = VocabMath(kernels.vocab_statistics, kernels.vocab_gradient, products)
        self.transform = Transform(config)
        columns = config.padded_vocab_size // group_size(group)
        self.bias = nn.Parameter(torch.empty(columns))
        self.words_here = max(0, min(columns, config.vocab_size - columns * group_rank(group)))

    def forward(
        self, hidden: torch.Tensor, word_embedding: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's columns of the logits [M, columns] of hidden states [M, H], -inf in
        padded ones; with `labels` [M], the loss of each target and whether it is predicted right.
        """
        transformed = copy_to_group(self.transform(hidden), self.group)
        if labels is not None:
            return vocab_parallel_loss(
                transformed,
                word_embedding,
                self.bias,
                labels,
                self.words_here,
                self.group,
                self.math,
            )

        logits = self.math.products.linear(transformed, word_embedding, self.bias).float()
        padding = torch.arange(logits.shape[1], device=logits.device) >= self.words_here

        return logits.masked_fill(padding, float("-inf"))


class RegionHead(nn.Module):
    """Predict the classes (MRM) or attributes of masked regions: [M, H] -> logits [M, classes]."""

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, classes)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden))


class FeatureHead(nn.Module):
    """Predict the features of masked regions (MRFR): [M, H] -> [M, F], by the transposed projection
    of features into the model (UNITER).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.empty(config.feature_dim))

    def forward(self, hidden: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        """Return features from states and the projection [H, F]."""
        return self.transform(hidden) @ projection + self.bias


class SentenceHead(nn.Module):
    """Classify texts as BERT does: [CLS] [B, H], Linear, tanh, dropout, Linear -> [B, labels]."""

    def __init__(self, config: ModelConfig, labels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, labels)
        self.dropout = config.hidden_dropout

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        return self.output(F.dropout(torch.tanh(self.dense(first)), self.dropout, self.training))


@dataclass(frozen=True)
class TaskHead:
    """Describe the head of a downstream task.

    "answers" tells `outputs` classes apart by the fused vectors of `images` images; "regions" gives
    each region that a sample may choose a score. A head of pretraining is computed in
    `every_batch`, others in batches for them.
    """

    kind: str
    outputs: int = 1
    images: int = 1
    every_batch: bool = False

    def build(self, config: ModelConfig) -> nn.Module:
        """Build the head."""
        if self.kind == "regions":
            return RegionScores(config)
        return AnswerHead(config, self.images, self.outputs)


class AnswerHead(nn.Module):
    """Classify fused vectors by Linear, GELU, LayerNorm, Linear: [B * images, P] -> [B, outputs].

    The hidden layer is twice as wide as the model, as in the heads for VQA of LXMERT, UNITER and
    VOLTA.
    """

    def __init__(self, config: ModelConfig, images: int, outputs: int) -> None:
        super().__init__()
        self.inputs = images * config.pooled_size
        width = 2 * config.hidden_size
        self.dense = nn.Linear(self.inputs, width)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.output = nn.Linear(width, outputs)

    def forward(self, fused: torch.Tensor) -> torch.Tensor:
        rows = fused.numel() // self.inputs
        return self.output(self.norm(F.gelu(self.dense(fused.reshape(rows, self.inputs)))))


class RegionScores(nn.Module):
    """Score regions by their states in the image stream, by dropout and Linear: [C, H] -> [C]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.output = nn.Linear(config.hidden_size, 1)
        self.dropout = config.image_hidden_dropout

    def forward(self, regions: torch.Tensor) -> torch.Tensor:
        return self.output(F.dropout(regions, self.dropout, self.training)).squeeze(1)


class Pooler(nn.Module):
    """Pool the first token of each sequence by Linear and ReLU: [B, H] -> [B, P]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooled_size)

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        return F.relu(self.dense(first))
