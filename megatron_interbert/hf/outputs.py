"""Define what the Hugging Face classes return.

Padded positions hold zeros. `loss` is None unless labels were given.

Legend: B samples, T text columns, R region columns, H hidden size, P pooled size, V vocabulary, C
region classes.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class InterBertModelOutput(ModelOutput):
    """Hold the results of both streams; those of the image are None for text-only inputs."""

    text_hidden: torch.Tensor | None = None  # [B, T, H]
    image_hidden: torch.Tensor | None = None  # [B, 1 + R, H], row 0 is [IMG]
    pooled_text: torch.Tensor | None = None  # [B, P]
    pooled_image: torch.Tensor | None = None  # [B, P]


@dataclass
class InterBertForPreTrainingOutput(ModelOutput):
    """Hold float32 logits of the pretraining heads at every position, and both streams."""

    loss: torch.Tensor | None = None
    msm_logits: torch.Tensor | None = None  # [B, T, V]
    mrm_logits: torch.Tensor | None = None  # [B, R, C]
    itm_logits: torch.Tensor | None = None  # [B, 2], class 0 = matched
    text_hidden: torch.Tensor | None = None  # [B, T, H]
    image_hidden: torch.Tensor | None = None  # [B, 1 + R, H]
    pooled_text: torch.Tensor | None = None  # [B, P]
    pooled_image: torch.Tensor | None = None  # [B, P]


@dataclass
class InterBertForImageTextRetrievalOutput(ModelOutput):
    """Hold how well the caption of each pair fits its image."""

    loss: torch.Tensor | None = None
    itm_logits: torch.Tensor | None = None  # [B, 2], class 0 = matched
    scores: torch.Tensor | None = None  # [B] logit(matched) - logit(mismatched), to rank by
