"""Define what a user would run instead: InterBERT over padded batches in plain modules, and two
models of transformers at the same size.

Each is a module whose forward takes a PaddedBatch and returns the loss.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from megatron_interbert.config.model import ModelConfig
from tools.benchmarks.batches import ANSWERS, IGNORED, PaddedBatch

if TYPE_CHECKING:
    from transformers import LxmertConfig

HIDDEN_PLACE = -10000.0  # added to the scores of padding


class Layer(nn.Module):
    """Compute a BERT layer over [B, L, H] with separate projections and whole score matrices, one
    operation after another.
    """

    def __init__(self, sizes: ModelConfig, heads: int, dropout: float) -> None:
        super().__init__()
        hidden = sizes.hidden_size
        self.heads = heads
        self.query, self.key, self.value, self.context = (
            nn.Linear(hidden, hidden) for _ in range(4)
        )
        self.up = nn.Linear(hidden, sizes.ffn_hidden_size)
        self.down = nn.Linear(sizes.ffn_hidden_size, hidden)
        self.first_norm, self.second_norm = (
            nn.LayerNorm(hidden, sizes.layer_norm_eps) for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        query, key, value = (self._by_head(part(x)) for part in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
        attended = (self.dropout(scores.softmax(dim=-1)) @ value).transpose(1, 2).flatten(2)
        x = self.first_norm(x + self.dropout(self.context(attended)))
        return self.second_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class PaddedInterBert(nn.Module):
    """Compute InterBERT as published code does: every position of the padded batch goes through
    every layer and head.
    """

    def __init__(self, sizes: ModelConfig) -> None:
        super().__init__()
        hidden = sizes.hidden_size
        self.word = nn.Embedding(sizes.padded_vocab_size, hidden)
        self.position = nn.Embedding(sizes.max_position_embeddings, hidden)
        self.token_type = nn.Embedding(sizes.type_vocab_size, hidden)
        self.feature = nn.Linear(sizes.feature_dim, hidden)
        self.location = nn.Linear(5, hidden)
        self.text_norm = nn.LayerNorm(hidden)
        self.image_norm = nn.LayerNorm(hidden)

        def stack(count: int, heads: int, dropout: float) -> nn.ModuleList:
            return nn.ModuleList(Layer(sizes, heads, dropout) for _ in range(count))

        self.interaction = stack(
            sizes.interaction_layers, sizes.num_attention_heads, sizes.hidden_dropout
        )
        self.text_stream = stack(sizes.text_layers, sizes.num_attention_heads, sizes.hidden_dropout)
        self.image_stream = stack(
            sizes.image_layers, sizes.image_attention_heads, sizes.image_hidden_dropout
        )
        self.poolers = nn.ModuleList(nn.Linear(hidden, sizes.pooled_size) for _ in range(2))
        self.transforms = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden))
            for _ in range(2)
        )
        self.word_bias = nn.Parameter(torch.zeros(sizes.padded_vocab_size))
        self.region_head = nn.Linear(hidden, sizes.num_classes)
        self.match = nn.Linear(sizes.pooled_size, 2)
        self.dropout = nn.Dropout(sizes.hidden_dropout)

    def forward(self, batch: PaddedBatch) -> torch.Tensor:
        """Return the sum of the three mean losses, a scalar."""
        places = torch.arange(batch.token_ids.shape[1], device=batch.token_ids.device)
        types = torch.zeros_like(batch.token_ids)
        text = self.word(batch.token_ids) + self.position(places) + self.token_type(types)
        text = self.dropout(self.text_norm(text))
        counts = batch.region_mask.sum(dim=1)[:, None]
        mean = (batch.features.sum(dim=1) / counts)[:, None]
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], device=mean.device).expand(len(mean), 1, 5)
        image = self.feature(torch.cat([mean, batch.features], dim=1)) + self.location(
            torch.cat([whole, batch.locations], dim=1)
        )
        image = self.dropout(self.image_norm(image))
        image_mask = torch.cat([torch.ones_like(counts), batch.region_mask], dim=1)

        def bias(mask: torch.Tensor) -> torch.Tensor:
            return ((1.0 - mask) * HIDDEN_PLACE)[:, None, None, :]

        joint = torch.cat([image, text], dim=1)
        joint_bias = bias(torch.cat([image_mask, batch.token_mask], dim=1))
        for layer in self.interaction:
            joint = layer(joint, joint_bias)

        image, text = joint.split([image.shape[1], text.shape[1]], dim=1)
        for layer in self.image_stream:
            image = layer(image, bias(image_mask))
        for layer in self.text_stream:
            text = layer(text, bias(batch.token_mask))

        words = F.linear(self.transforms[0](text), self.word.weight, self.word_bias)
        regions = self.region_head(self.transforms[1](image[:, 1:]))
        pooled = F.relu(self.poolers[0](text[:, 0])) * F.relu(self.poolers[1](image[:, 0]))

        return (
            F.cross_entropy(words.flatten(0, 1), batch.word_labels.flatten(), ignore_index=IGNORED)
            + F.cross_entropy(
                regions.flatten(0, 1), batch.region_labels.flatten(), ignore_index=IGNORED
            )
            + F.cross_entropy(self.match(self.dropout(pooled)), batch.mismatched)
        )


def lxmert_config(sizes: ModelConfig, count: int) -> "LxmertConfig":
    """Return the sizes of LXMERT with `count` layers over words and the others in proportion."""
    from transformers import LxmertConfig

    return LxmertConfig(
        l_layers=count,
        x_layers=max(1, round(count * 5 / 9)),
        r_layers=max(1, round(count * 5 / 9)),
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.ffn_hidden_size,
        max_position_embeddings=sizes.max_position_embeddings,
        num_object_labels=sizes.num_classes,
        num_qa_labels=ANSWERS,
        visual_feat_dim=sizes.feature_dim,
        task_qa=False,
        visual_attr_loss=False,
        visual_feat_loss=False,
    )


class Lxmert(nn.Module):
    """Wrap transformers' LXMERT with its losses for words, objects and matching.

    Its layers are in proportions 9 : 5 : 5, as many as come nearest to `values` parameters.
    """

    def __init__(self, sizes: ModelConfig, values: int) -> None:
        super().__init__()
        from transformers import LxmertForPreTraining

        def make(count: int) -> nn.Module:
            return LxmertForPreTraining(lxmert_config(sizes, count))

        self.model = closest(make, values)

    def forward(self, batch: PaddedBatch) -> torch.Tensor:
        return self.model(
            input_ids=batch.token_ids,
            attention_mask=batch.token_mask,
            visual_feats=batch.features,
            visual_pos=batch.locations[..., :4],
            visual_attention_mask=batch.region_mask,
            labels=batch.word_labels,
            obj_labels={
                "obj": (batch.region_labels.clamp(min=0), (batch.region_labels != IGNORED).float())
            },
            matched_label=1 - batch.mismatched,
        ).loss


class LxmertForAnswers(nn.Module):
    """Wrap transformers' LXMERT for question answering, with VQA's binary cross entropy; see
    Lxmert.
    """

    def __init__(self, sizes: ModelConfig, values: int) -> None:
        super().__init__()
        from transformers import LxmertForQuestionAnswering

        def make(count: int) -> nn.Module:
            return LxmertForQuestionAnswering(lxmert_config(sizes, count))

        self.model = closest(make, values)

    def forward(self, batch: PaddedBatch) -> torch.Tensor:
        logits = self.model(
            input_ids=batch.token_ids,
            attention_mask=batch.token_mask,
            visual_feats=batch.features,
            visual_pos=batch.locations[..., :4],
            visual_attention_mask=batch.region_mask,
        ).question_answering_score
        losses = F.binary_cross_entropy_with_logits(logits, batch.answers, reduction="sum")

        return losses / len(logits)


class VisualBert(nn.Module):
    """Wrap transformers' VisualBERT with its losses for words and matching (it has none for
    regions).
    """

    def __init__(self, sizes: ModelConfig, values: int) -> None:
        super().__init__()
        from transformers import VisualBertConfig, VisualBertForPreTraining

        def make(count: int) -> nn.Module:
            return VisualBertForPreTraining(
                VisualBertConfig(
                    num_hidden_layers=count,
                    vocab_size=sizes.vocab_size,
                    hidden_size=sizes.hidden_size,
                    num_attention_heads=sizes.num_attention_heads,
                    intermediate_size=sizes.ffn_hidden_size,
                    max_position_embeddings=sizes.max_position_embeddings,
                    visual_embedding_dim=sizes.feature_dim,
                )
            )

        self.model = closest(make, values)

    def forward(self, batch: PaddedBatch) -> torch.Tensor:
        beyond = torch.full_like(batch.region_labels, IGNORED)
        return self.model(
            input_ids=batch.token_ids,
            attention_mask=batch.token_mask,
            visual_embeds=batch.features,
            visual_attention_mask=batch.region_mask,
            visual_token_type_ids=torch.ones_like(batch.region_labels),
            labels=torch.cat([batch.word_labels, beyond], dim=1),
            sentence_image_labels=batch.mismatched,
        ).loss


def closest(make: Callable[[int], nn.Module], values: int, most: int = 48) -> nn.Module:
    """Return the model of `make(layers)` whose number of parameters is nearest to `values`."""
    counts = {}

    for layers in range(1, most + 1):
        with torch.device("meta"):
            counts[layers] = abs(parameters(make(layers)) - values)
        if counts[layers] > min(counts.values()):
            break

    return make(min(counts, key=counts.get))


def parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
