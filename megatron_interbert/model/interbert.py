"""InterBERT: embeddings -> interaction module over both token kinds -> two independent streams -> poolers and heads.

Legend: B samples, Nt text tokens, Ni image tokens, H hidden, P pooled size, Mt and Mr masked words and regions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megatron_interbert.config import ModelConfig
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.kernels.gather import gather_rows
from megatron_interbert.model.embeddings import ImageEmbedding, TextEmbedding
from megatron_interbert.model.heads import Pooler, RegionHead, SentenceHead, WordHead
from megatron_interbert.model.partition import mark_shards
from megatron_interbert.model.transformer import TransformerLayer, TransformerStack
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState

PRETRAINING_HEADS = ("msm", "mrm", "itm")


class InterBertOutput(NamedTuple):
    """What one forward pass gives; logits only of the heads the model was built with. Logits are float32.

    A named tuple, because ZeRO-3 looks for the tensors of a module's output in tuples, lists and dicts only.
    """

    text_hidden: torch.Tensor  # [Nt, H]
    image_hidden: torch.Tensor  # [Ni, H]
    pooled_text: torch.Tensor | None  # [B, P]
    pooled_image: torch.Tensor | None = None  # [B with image, P]
    msm_logits: torch.Tensor | None = None  # [Mt, padded vocabulary / tensor-parallel ranks]
    mrm_logits: torch.Tensor | None = None  # [Mr, classes]
    itm_logits: torch.Tensor | None = None  # [B, 2], class 0 = matched
    choice_logit: torch.Tensor | None = None  # [B, 1]
    sentence_logits: torch.Tensor | None = None  # [B, labels]


class InterBert(nn.Module):
    """The whole model. `heads` is any of msm, mrm, itm, choice, sentence (of `num_labels`).

    Parameters are empty until initialised or loaded. `text_only` builds the text path alone: BERT's topology.
    """

    def __init__(
        self,
        config: ModelConfig,
        heads: Sequence[str] = PRETRAINING_HEADS,
        *,
        state: ParallelState | None = None,
        kernels: Kernels | None = None,
        streams: RandomStreams | None = None,
        recompute: bool = False,
        num_labels: int = 2,
        text_only: bool = False,
    ) -> None:
        super().__init__()
        state, kernels = state or ParallelState(), kernels or Kernels()
        streams = streams or RandomStreams(0)
        config.check_tensor_parallel(state.tensor_size)
        self.config = config
        self.text_embedding = TextEmbedding(config, state.tensor_group)
        if not text_only:
            self.image_embedding = ImageEmbedding(config)

        def stack(count: int, heads: int, hidden_dropout: float, attention_dropout: float) -> TransformerStack:
            layers = [
                TransformerLayer(
                    config.hidden_size,
                    heads,
                    config.ffn_hidden_size,
                    hidden_dropout,
                    attention_dropout,
                    config.layer_norm_eps,
                    state.tensor_group,
                    kernels,
                    streams,
                )
                for _ in range(count)
            ]
            return TransformerStack(layers, streams, recompute)

        text_like = (config.num_attention_heads, config.hidden_dropout, config.attention_dropout)
        self.interaction = stack(config.interaction_layers, *text_like)
        self.text_stream = stack(config.text_layers, *text_like)
        if not text_only:
            self.image_stream = stack(
                config.image_layers, config.image_attention_heads, config.image_hidden_dropout, config.image_attention_dropout
            )
            self.text_pooler, self.image_pooler = Pooler(config), Pooler(config)
        if "msm" in heads:
            self.msm_head = WordHead(config, state.tensor_group)
        if "mrm" in heads:
            self.mrm_head = RegionHead(config)
        if "itm" in heads:
            self.itm_head = nn.Linear(config.pooled_size, 2)
        if "choice" in heads:
            self.choice_head = nn.Linear(config.pooled_size, 1)
        if "sentence" in heads:
            self.sentence_head = SentenceHead(config, num_labels)
        mark_shards(self)

    def forward(self, batch: PackedBatch) -> InterBertOutput:
        """Both streams, pooled vectors, and the logits of the heads there are: words and regions at target positions only."""
        text, image = self.encode(batch)
        first = text.index_select(0, batch.text_offsets[:-1])
        pooled_text = self.text_pooler(first) if hasattr(self, "text_pooler") else None
        pooled_image = self.image_pooler(image.index_select(0, batch.summary_rows)) if len(image) else None
        logits = {}
        if hasattr(self, "msm_head"):
            targets = text.index_select(0, batch.msm_positions)
            logits["msm_logits"] = self.msm_head(targets, self.text_embedding.word.weight)
        if hasattr(self, "mrm_head") and len(image):
            logits["mrm_logits"] = self.mrm_head(image.index_select(0, batch.mrm_positions)).float()
        if hasattr(self, "sentence_head"):
            logits["sentence_logits"] = self.sentence_head(first).float()
        if pooled_image is not None and (hasattr(self, "itm_head") or hasattr(self, "choice_head")):
            fused = F.dropout(self.fuse(pooled_text, pooled_image), self.config.hidden_dropout, self.training)
            if hasattr(self, "itm_head"):
                logits["itm_logits"] = self.itm_head(fused).float()
            if hasattr(self, "choice_head"):
                logits["choice_logit"] = self.choice_head(fused).float()
        return InterBertOutput(text, image, pooled_text, pooled_image, **logits)

    def encode(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of both streams: text [Nt, H] and image [Ni, H] (empty for text-only batches)."""
        text = self.text_embedding(batch.token_ids, batch.token_positions, batch.token_types)
        if not len(batch.locations):  # text only: the joint order is the text order
            text = self.interaction(text, batch.text_offsets, batch.max_text)
            return self.text_stream(text, batch.text_offsets, batch.max_text), text[:0]
        by_kind = torch.cat([batch.image_index, batch.text_index])
        joint = gather_rows(torch.cat([self.image_embedding(batch), text]), batch.joint_order, by_kind)
        joint = self.interaction(joint, batch.joint_offsets, batch.max_joint)
        image, text = gather_rows(joint, by_kind, batch.joint_order).split([len(batch.image_index), len(batch.text_index)])
        text = self.text_stream(text, batch.text_offsets, batch.max_text)
        image = self.image_stream(image, batch.image_offsets, batch.max_image)
        return text, image

    def fuse(self, pooled_text: torch.Tensor, pooled_image: torch.Tensor) -> torch.Tensor:
        """Element-wise product (or sum) of the pooled vectors [B, P]."""
        return pooled_text * pooled_image if self.config.fusion == "product" else pooled_text + pooled_image
