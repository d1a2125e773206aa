"""Define InterBERT: embeddings, interaction module over both token kinds, two independent streams,
poolers and heads.

Legend: B samples, Nt text tokens, Ni image tokens, H hidden size, P pooled size, Mt and Mr masked
words and regions.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.kernels.gather import gather_rows
from megatron_interbert.kernels.sequences import Sequences
from megatron_interbert.model.embeddings import ImageEmbedding, TextEmbedding
from megatron_interbert.model.experts import Experts
from megatron_interbert.model.heads import (
    FeatureHead,
    Pooler,
    RegionHead,
    RegionScores,
    SentenceHead,
    TaskHead,
    WordHead,
)
from megatron_interbert.model.partition import mark_shards
from megatron_interbert.model.router import RouterReport
from megatron_interbert.model.routing_groups import RoutingRule
from megatron_interbert.model.transformer import Mlp, TransformerLayer, TransformerStack
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState

PRETRAINING_HEADS = ("msm", "mrm", "itm")


class InterBertOutput(NamedTuple):
    """Hold the results of a forward pass; those of heads that the model lacks are None.

    Losses and logits are float32. It is a named tuple because ZeRO-3 looks for the tensors of a
    module's output only in tuples, lists and dicts.
    """

    text_hidden: torch.Tensor | None  # [Nt, H], with `everything` or a model with `states`
    image_hidden: torch.Tensor | None  # [Ni, H], the same
    pooled_text: torch.Tensor | None  # [B, P]
    pooled_image: torch.Tensor | None = None  # [B with image, P]
    msm_losses: torch.Tensor | None = None  # [Mt]
    msm_right: torch.Tensor | None = None  # [Mt] whether the most likely word is the label
    # [Mt, padded vocabulary / tensor-parallel ranks], with `everything`, instead of the losses
    msm_logits: torch.Tensor | None = None
    mrm_logits: torch.Tensor | None = None  # [Mr, classes]
    mrfr_features: torch.Tensor | None = None  # [Mr, F]
    attribute_logits: torch.Tensor | None = None  # [Mr, attributes]
    # [B, 2], or [pairs, 2] for a batch that lists its pairs; class 0 = matched
    itm_logits: torch.Tensor | None = None
    choice_logit: torch.Tensor | None = None  # [B, 1]
    sentence_logits: torch.Tensor | None = None  # [B, labels]
    # of the head of each downstream task: [B, outputs], or [C] for one that scores regions; 0 rows
    # for tasks that the batch is not for
    task_outputs: dict[str, torch.Tensor] | None = None
    # of each layer with experts, in the order of use: see RouterReport
    balance: torch.Tensor | None = None  # [layers]
    router_figures: torch.Tensor | None = None  # [layers, experts + 4]


def build_stack(
    config: ModelConfig,
    state: ParallelState,
    kernels: Kernels,
    streams: RandomStreams,
    recompute: bool,
    rule: RoutingRule,
    name: str,
    heads: int,
    hidden_dropout: float,
    attention_dropout: float,
) -> TransformerStack:
    """Build one of a model's stacks (interaction, text, image)."""
    depth = getattr(config, f"{name}_layers")

    def mlp() -> nn.Module:
        if config.has_experts(name):
            return Experts(config, state, kernels)
        return Mlp(config.hidden_size, config.ffn_hidden_size, state.placement, kernels)

    layers = [
        TransformerLayer(
            config.hidden_size,
            heads,
            mlp(),
            hidden_dropout,
            attention_dropout,
            config.layer_norm_eps,
            state.placement,
            kernels,
            streams,
        )
        for _ in range(min(depth, 1) if config.share_layers else depth)
    ]

    return TransformerStack(
        layers, state.placement, streams, recompute, kernels.row_multiple, depth, rule
    )


class InterBert(nn.Module):
    """Build the whole model, with any heads of msm, mrm, mrfr, itm, choice, sentence (of
    `num_labels`), one for `attributes` of regions if there are some, and those of downstream tasks
    by name.

    Parameters are uninitialised until drawn or loaded. `text_only` builds the text path alone:
    BERT's topology. `rule` limits and balances the load of experts in training. With `states`
    every forward pass returns the hidden states of all tokens.
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
        rule: RoutingRule | None = None,
        num_labels: int = 2,
        text_only: bool = False,
        task_heads: Mapping[str, TaskHead] | None = None,
        states: bool = False,
        attributes: int = 0,
    ) -> None:
        super().__init__()
        state = state or ParallelState()
        kernels = kernels or Kernels()
        streams = streams or RandomStreams(0)
        rule = rule or RoutingRule()
        config.check_tensor_parallel(state.tensor_size)
        config.check_expert_parallel(state.expert_size)
        self.divides_experts = state.expert_size > 1
        self.returns_states = states
        self.config = config
        self.text_embedding = TextEmbedding(config, state.tensor_group, kernels)
        if not text_only:
            self.image_embedding = ImageEmbedding(config, kernels)

        stack = partial(build_stack, config, state, kernels, streams, recompute, rule)
        text_like = (config.num_attention_heads, config.hidden_dropout, config.attention_dropout)
        self.interaction = stack("interaction", *text_like)
        self.text_stream = stack("text", *text_like)

        if not text_only:
            self.image_stream = stack(
                "image",
                config.image_attention_heads,
                config.image_hidden_dropout,
                config.image_attention_dropout,
            )
            self.text_pooler = Pooler(config)
            self.image_pooler = Pooler(config)

        if "msm" in heads:
            self.msm_head = WordHead(config, state.tensor_group, kernels)
        if "sentence" in heads:
            self.sentence_head = SentenceHead(config, num_labels)

        self._add_region_heads(heads, attributes)
        self._add_pair_heads(heads, task_heads or {})
        mark_shards(self)

    def _add_region_heads(self, heads: Sequence[str], attributes: int) -> None:
        """Add the heads that predict what is hidden of regions."""
        config = self.config
        if "mrm" in heads:
            self.mrm_head = RegionHead(config, config.num_classes)
        if "mrfr" in heads:
            self.mrfr_head = FeatureHead(config)
        if attributes:
            self.attribute_head = RegionHead(config, attributes)

    def _add_pair_heads(self, heads: Sequence[str], task_heads: Mapping[str, TaskHead]) -> None:
        """Add the heads that judge a text with an image, and those of downstream tasks."""
        config = self.config
        if "itm" in heads:
            self.itm_head = nn.Linear(config.pooled_size, 2)
        if "choice" in heads:
            self.choice_head = nn.Linear(config.pooled_size, 1)
        if task_heads:
            self.heads_of_all = {name for name, head in task_heads.items() if head.every_batch}
            self.task_heads = nn.ModuleDict(
                {name: head.build(config) for name, head in task_heads.items()}
            )

    def forward(self, batch: PackedBatch, everything: bool = False) -> InterBertOutput:
        """Compute pooled vectors and the outputs of the heads, for words and regions at target
        positions only.

        The last layer of each stream is computed only for the tokens that are pooled or predicted,
        and word logits exist only inside their loss. `everything` returns the hidden states of all
        tokens too, and the word logits instead of their losses. If several ranks divide the experts
        of the image stream, a batch without images has logits of 0 rows, for which a loss must be
        computed: all ranks go through the same layers, forward and backward.
        """
        words = batch.msm_positions
        regions = batch.mrm_positions
        text_rows = [
            batch.text_offsets[:-1].long(),
            words if hasattr(self, "msm_head") else words[:0],
        ]
        image_rows = [
            batch.summary_rows,
            regions if self._predicts_regions else regions[:0],
            batch.candidates,
        ]
        whole = everything or self.returns_states
        read = None if whole else (torch.cat(text_rows), torch.cat(image_rows))
        text, image, reports = self.encode(batch, read)

        if whole:
            first, words = (text.index_select(0, rows) for rows in text_rows)
            summaries, regions, candidates = (image.index_select(0, rows) for rows in image_rows)
        else:
            first, words = text.split([len(rows) for rows in text_rows])
            summaries, regions, candidates = image.split([len(rows) for rows in image_rows])

        pooled_text = self.text_pooler(first) if hasattr(self, "text_pooler") else None
        imageless = not len(summaries)
        calls_all = not imageless or self._waits_for_images
        pooled_image = self.image_pooler(summaries) if calls_all else None
        found = self._predict_words(first, words, batch, everything)

        if reports:
            balance, figures = zip(*reports, strict=True)
            found |= {"balance": torch.stack(balance), "router_figures": torch.stack(figures)}
        if calls_all:
            found |= self._predict_regions(regions)
        if pooled_image is not None:
            paired = pooled_text[:0] if imageless else pooled_text
            found |= self._judge_pairs(paired, pooled_image, candidates, batch)

        states = (text, image) if whole else (None, None)

        return InterBertOutput(*states, pooled_text, pooled_image, **found)

    def _predict_words(
        self, first: torch.Tensor, words: torch.Tensor, batch: PackedBatch, everything: bool
    ) -> dict[str, torch.Tensor]:
        """Return the outputs of the heads that read the text stream: of [CLS] [B, H] and of masked
        words [M, H].
        """
        found = {}
        if hasattr(self, "sentence_head"):
            found["sentence_logits"] = self.sentence_head(first).float()
        if not hasattr(self, "msm_head"):
            return found

        table = self.text_embedding.word.weight
        if everything:
            return {**found, "msm_logits": self.msm_head(words, table)}

        losses, right = self.msm_head(words, table, batch.msm_labels)

        return {**found, "msm_losses": losses, "msm_right": right}

    def _predict_regions(self, regions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs of the heads that read masked regions [M, H]."""
        found = {}
        if hasattr(self, "mrm_head"):
            found["mrm_logits"] = self.mrm_head(regions).float()
        if hasattr(self, "mrfr_head"):
            projection = self.image_embedding.feature.weight
            found["mrfr_features"] = self.mrfr_head(regions, projection).float()
        if hasattr(self, "attribute_head"):
            found["attribute_logits"] = self.attribute_head(regions).float()

        return found

    def _judge_pairs(
        self,
        pooled_text: torch.Tensor,
        pooled_image: torch.Tensor,
        candidates: torch.Tensor,
        batch: PackedBatch,
    ) -> dict[str, Any]:
        """Return the logits [B, ..] of the heads that judge a text with an image, for each sample
        or for the pairs that the batch lists, and those of regions to choose among [C, H].
        """
        found: dict[str, Any] = {}
        if not any(hasattr(self, name) for name in ("itm_head", "choice_head", "task_heads")):
            return found

        if len(batch.pair_text):
            pooled_text = pooled_text[batch.pair_text]
            pooled_image = pooled_image[batch.pair_image]

        fused = self.fuse(pooled_text, pooled_image)
        fused = F.dropout(fused, self.config.hidden_dropout, self.training)
        if hasattr(self, "itm_head"):
            found["itm_logits"] = self.itm_head(fused).float()
        if hasattr(self, "choice_head"):
            found["choice_logit"] = self.choice_head(fused).float()
        if hasattr(self, "task_heads"):
            found["task_outputs"] = self._task_outputs(fused, candidates, batch.head)

        return found

    def _task_outputs(
        self, fused: torch.Tensor, candidates: torch.Tensor, task: str
    ) -> dict[str, torch.Tensor]:
        """Return the outputs of all task heads. Those of other tasks compute them for 0 rows, so
        that their parameters get a gradient of zeros on every layout.
        """
        outputs = {}
        for name, head in self.task_heads.items():
            states = candidates if isinstance(head, RegionScores) else fused
            is_asked = name == task or name in self.heads_of_all
            outputs[name] = head(states if is_asked else states[:0]).float()

        return outputs

    def encode(
        self, batch: PackedBatch, read: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[RouterReport, ...]]:
        """Return the hidden states of both streams: text [Nt, H] and image [Ni, H] (empty for
        text-only batches), or only those of the text and image tokens in `read`; and the reports of
        experts.
        """
        text_rows, image_rows = read or (None, None)
        text = self.text_embedding(batch.token_ids, batch.token_positions, batch.token_types)
        texts = Sequences(batch.text_offsets, batch.max_text)
        if not len(batch.locations) and not self._waits_for_images:
            # the joint order is the text order
            text, of_interaction = self.interaction(text, texts)
            text, of_text = self.text_stream(text, texts, text_rows)
            return text, text[:0], of_interaction + of_text

        by_kind = torch.cat([batch.image_index, batch.text_index])
        joint = gather_rows(
            torch.cat([self.image_embedding(batch), text]), batch.joint_order, by_kind
        )
        joints = Sequences(batch.joint_offsets, batch.max_joint)
        joint, of_interaction = self.interaction(joint, joints)

        image, text = gather_rows(joint, by_kind, batch.joint_order).split(
            [len(batch.image_index), len(batch.text_index)]
        )
        text, of_text = self.text_stream(text, texts, text_rows)
        images = Sequences(batch.image_offsets, batch.max_image)
        image, of_image = self.image_stream(image, images, image_rows)

        return text, image, of_interaction + of_text + of_image

    @property
    def _predicts_regions(self) -> bool:
        """Check whether a head predicts something of masked regions."""
        return any(hasattr(self, name) for name in ("mrm_head", "mrfr_head", "attribute_head"))

    @property
    def _waits_for_images(self) -> bool:
        """Check whether other ranks may wait for this one in the image stream, even if it has no
        image: for its experts, or at ZeRO stage 3 for its parameters.
        """
        if not hasattr(self, "image_stream") or not self.config.has_experts("image"):
            return False

        in_parts = any(hasattr(p, "ds_id") for p in self.image_pooler.parameters())
        return self.divides_experts or in_parts

    def fuse(self, pooled_text: torch.Tensor, pooled_image: torch.Tensor) -> torch.Tensor:
        """Return the element-wise product or sum of the pooled vectors [B, P]."""
        return (
            pooled_text * pooled_image
            if self.config.fusion == "product"
            else pooled_text + pooled_image
        )
