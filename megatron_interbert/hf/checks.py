"""Check padded inputs against the model and each other; errors name the input, what it is and what
was expected.

`given` holds inputs by name, None for those left out. Legend: B samples, T text columns, R region
columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError

Given = Mapping[str, Any]
REGIONAL = ("visual_pos", "visual_attention_mask", "region_mask")


def check_inputs(given: Given, config: ModelConfig) -> None:
    """Raise UsageError for inputs [B, T] and [B, R, ..] that are missing, or whose types or shapes
    do not fit each other or the model.
    """
    refuse_other_kinds(given)
    ids = given["input_ids"]
    features = given["visual_feats"]
    if ids is None or ids.dim() != 2 or not ids.numel():
        raise UsageError(f"input_ids has shape {shape_of(ids)}, expected [samples, tokens]")
    if ids.shape[1] > config.max_position_embeddings:
        raise UsageError(
            f"input_ids has {ids.shape[1]} columns, the model has only"
            f" {config.max_position_embeddings} positions"
        )

    if features is None:
        for name in REGIONAL:
            if given[name] is not None:
                raise UsageError(
                    f"{name} is given without visual_feats [samples, regions, {config.feature_dim}]"
                )
    elif given["visual_pos"] is None:
        raise UsageError(
            "visual_feats is given without visual_pos [samples, regions, 5], the regions' positions"
        )

    refuse_other_shapes(given, ids.shape, ids.shape[:1], config)


def check_choices(given: Given, config: ModelConfig) -> None:
    """Check inputs of multiple choice likewise: text [B, choices, T] and images [B, R, ..] or
    [B, choices, R, ..], before they are flattened.
    """
    refuse_other_kinds(given)
    ids = given["input_ids"]
    features = given["visual_feats"]

    if ids is None or ids.dim() != 3 or not ids.numel():
        raise UsageError(
            f"input_ids has shape {shape_of(ids)}, expected [samples, choices, tokens]"
        )

    refuse_other_shapes(given, ids.shape, ids.shape[: 2 if features.dim() == 4 else 1], config)


def refuse_other_kinds(given: Given) -> None:
    """Raise UsageError for inputs that are not tensors, and for ids that are not integers, which
    would be truncated silently.
    """
    for name, value in given.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise UsageError(f"{name} is of type {type(value).__name__}, expected a tensor")

    ids = given["input_ids"]
    if ids is not None and (ids.is_floating_point() or ids.is_complex()):
        raise UsageError(f"input_ids has type {ids.dtype}, expected integers")


def refuse_other_shapes(
    given: Given, text: Sequence[int], images: Sequence[int], config: ModelConfig
) -> None:
    """Raise UsageError for text inputs of a shape other than `text`, and for visual ones of a shape
    other than [*images, R] followed by their own size.
    """
    expected: dict[str, list[Any]] = {"attention_mask": [*text], "token_type_ids": [*text]}
    features = given["visual_feats"]
    if features is not None:
        regions = features.shape[-2] if features.dim() == len(images) + 2 else "regions"
        tails = {"visual_feats": [config.feature_dim], "visual_pos": [5]}
        expected |= {
            name: [*images, regions, *tails.get(name, [])] for name in ("visual_feats", *REGIONAL)
        }

    for name, shape in expected.items():
        if given.get(name) is not None and shape_of(given[name]) != shape:
            raise UsageError(
                f"{name} has shape {shape_of(given[name])}, expected [{', '.join(map(str, shape))}]"
            )


def refuse_empty_samples(lengths: torch.Tensor, pictured: bool) -> None:
    """Raise UsageError naming the first sample without a real token or, in a batch with images,
    without a real region.
    """
    for name, found, least in (
        ("attention_mask", lengths[0], 1),
        ("visual_attention_mask", lengths[1], 2 * pictured),
    ):
        if (found < least).any():
            what = (
                "token"
                if name == "attention_mask"
                else "region (for text-only samples leave out all visual inputs)"
            )
            raise UsageError(
                f"{name}: sample {int((found < least).nonzero()[0])} has no real {what}"
            )


def value_ranges(
    ids: torch.Tensor, types: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor:
    """Return the least and largest id and the least and largest type at the real `tokens` [B, T],
    int64 [4]; padding counts as 0, which is always in range.
    """
    types = torch.zeros_like(ids) if types is None else types
    return torch.stack(
        [end for values in (ids, types) for end in values.long().where(tokens, 0).aminmax()]
    )


def refuse_unknown_values(ranges: Sequence[int], config: ModelConfig) -> None:
    """Raise UsageError if `value_ranges` hold ids or types that the model does not have.

    Unchecked, they would leave a GPU unusable, or silently read padded rows of the vocabulary.
    """
    for name, found, size in (
        ("input_ids", ranges[:2], config.vocab_size),
        ("token_type_ids", ranges[2:], config.type_vocab_size),
    ):
        for value in found:
            if not 0 <= value < size:
                raise UsageError(
                    f"{name} holds {value}, expected 0 to {size - 1}; use the vocabulary and types"
                    " that the model was trained with"
                )


def shape_of(tensor: torch.Tensor | None) -> list[int] | None:
    """Return the shape as a list; None without a tensor."""
    return None if tensor is None else [*tensor.shape]
