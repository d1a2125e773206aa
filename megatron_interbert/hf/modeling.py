"""Define InterBERT's Hugging Face classes: padded inputs (`padding.PaddedInputs`) in, the packed
core inside, ModelOutputs out.

Legend: B samples, T text columns, R region columns, C region classes or choices.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import MultipleChoiceModelOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from megatron_interbert.errors import UsageError
from megatron_interbert.hf.base import InterBertPreTrainedModel
from megatron_interbert.hf.checks import check_choices
from megatron_interbert.hf.configuration import InterBertConfig
from megatron_interbert.hf.losses import check_labels, region_loss, word_loss
from megatron_interbert.hf.outputs import (
    InterBertForImageTextRetrievalOutput,
    InterBertForPreTrainingOutput,
    InterBertModelOutput,
)
from megatron_interbert.hf.padding import PaddedInputs, to_padded

Tensor = torch.Tensor


class InterBertModel(InterBertPreTrainedModel):
    """Run both streams, without heads."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        visual_feats: Tensor | None = None,
        visual_pos: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
    ) -> InterBertModelOutput:
        """Return hidden states and pooled vectors, only those of the text without visual input."""
        inputs = PaddedInputs(
            input_ids,
            attention_mask,
            token_type_ids,
            visual_feats,
            visual_pos,
            visual_attention_mask,
        )
        return InterBertModelOutput(**self.streams(*self.run(inputs, everything=True), inputs))


class InterBertForPreTraining(InterBertPreTrainedModel):
    """Predict masked words, masked regions and matching, with their losses."""

    heads = ("msm", "mrm", "itm")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        visual_feats: Tensor | None = None,
        visual_pos: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        region_mask: Tensor | None = None,
        labels: Tensor | None = None,
        region_targets: Tensor | None = None,
        matched_label: Tensor | None = None,
    ) -> InterBertForPreTrainingOutput:
        """Return the logits of all heads; `loss` is the sum of the losses whose labels are given.

        labels [B, T]: words to predict, -100 elsewhere (input_ids hold the masked text).
        region_mask [B, R]: regions hidden from the model. region_targets: their class ids [B, R] or
        distributions [B, R, C]. matched_label [B]: 0 = matched.
        """
        inputs = PaddedInputs(
            input_ids,
            attention_mask,
            token_type_ids,
            visual_feats,
            visual_pos,
            visual_attention_mask,
        )
        output, slots = self.run(inputs, region_mask, everything=True)
        words = output.msm_logits[:, : self.config.vocab_size]
        regions = output.mrm_logits
        losses = []
        if labels is not None:
            check_labels("labels", labels, [*input_ids.shape])
            losses.append(word_loss(words, labels, slots))

        if matched_label is not None:
            needs_images(self, visual_feats, "matched_label")
            check_labels("matched_label", matched_label, [len(input_ids)])
            losses.append(F.cross_entropy(output.itm_logits, matched_label))

        if region_targets is not None:
            if region_mask is None:
                raise UsageError(
                    "region_targets is given without region_mask [samples, regions], the regions to"
                    " hide and predict"
                )

            shape = [*visual_feats.shape[:2]]
            check_labels("region_targets", region_targets, shape, [*shape, self.config.num_classes])
            losses.append(region_loss(regions, region_targets, region_mask, matched_label, slots))

        return InterBertForPreTrainingOutput(
            loss=sum(losses) if losses else None,
            msm_logits=to_padded(words, slots.text, *input_ids.shape),
            mrm_logits=(
                None
                if visual_feats is None
                else to_padded(regions, slots.regions, *visual_feats.shape[:2])
            ),
            itm_logits=output.itm_logits,
            **self.streams(output, slots, inputs),
        )


class InterBertForImageTextRetrieval(InterBertPreTrainedModel):
    """Score by the matching head how well captions fit images."""

    heads = ("itm",)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        visual_feats: Tensor | None = None,
        visual_pos: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> InterBertForImageTextRetrievalOutput:
        """Return logits and scores [B] of pairs; labels [B]: 0 = matched, 1 = mismatched."""
        needs_images(self, visual_feats)
        inputs = PaddedInputs(
            input_ids,
            attention_mask,
            token_type_ids,
            visual_feats,
            visual_pos,
            visual_attention_mask,
        )
        logits = self.run(inputs)[0].itm_logits
        check_labels("labels", labels, [len(logits)])

        return InterBertForImageTextRetrievalOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            itm_logits=logits,
            scores=logits[:, 0] - logits[:, 1],
        )


class InterBertForMultipleChoice(InterBertPreTrainedModel):
    """Compute one logit for each choice (VCR)."""

    heads = ("choice",)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        visual_feats: Tensor | None = None,
        visual_pos: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> MultipleChoiceModelOutput:
        """Return logits of the choices [B, C]. Text inputs are [B, C, T]; visual ones [B, R, ..],
        shared by the choices, or [B, C, R, ..]; labels [B] are the right choices.
        """
        needs_images(self, visual_feats)
        inputs = PaddedInputs(
            input_ids,
            attention_mask,
            token_type_ids,
            visual_feats,
            visual_pos,
            visual_attention_mask,
        )
        check_choices(inputs._asdict(), self.interbert.config)
        samples, choices = input_ids.shape[:2]
        check_labels("labels", labels, [samples])
        text = [None if x is None else x.flatten(0, 1) for x in inputs[:3]]
        shared = visual_feats.dim() == 3
        visual = [
            (
                None
                if x is None
                else x.repeat_interleave(choices, dim=0)
                if shared
                else x.flatten(0, 1)
            )
            for x in inputs[3:]
        ]
        logits = self.run(PaddedInputs(*text, *visual))[0].choice_logit.view(samples, choices)

        return MultipleChoiceModelOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits
        )


class InterBertForSequenceClassification(InterBertPreTrainedModel):
    """Classify (or regress) `num_labels` by a new linear layer over the pooled text, or over the
    fused text and image.
    """

    def add_parts(self, config: InterBertConfig) -> None:
        self.classifier = nn.Linear(config.pooled_size, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        visual_feats: Tensor | None = None,
        visual_pos: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Return logits [B, num_labels]; labels are [B] (classes, or numbers for regression) or
        [B, num_labels], by `config.problem_type` as in transformers.
        """
        inputs = PaddedInputs(
            input_ids,
            attention_mask,
            token_type_ids,
            visual_feats,
            visual_pos,
            visual_attention_mask,
        )
        output = self.run(inputs)[0]
        pooled = output.pooled_text
        if visual_feats is not None:
            pooled = self.interbert.fuse(pooled, output.pooled_image)

        logits = self.classifier(F.dropout(pooled, self.config.hidden_dropout, self.training))
        loss = (
            None
            if labels is None
            else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        )

        return SequenceClassifierOutput(loss=loss, logits=logits)


def needs_images(
    model: InterBertPreTrainedModel, visual_feats: Tensor | None, what: str = ""
) -> None:
    """Raise UsageError if there is no visual input, which `what` or the head needs."""
    if visual_feats is None:
        raise UsageError(
            f"{type(model).__name__}: {what or 'this head'} needs visual_feats and visual_pos"
            " beside the text"
        )
