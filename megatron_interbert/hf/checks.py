"""Padded inputs that do not fit the model or each other: one line that names the input, what it is
and what was expected.

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
    """Raise UsageError for inputs [B, T] and [B, R, ..] that are missing or whose kinds or shapes
    fit neither each other nor the model.
    """
    refuse_other_kinds(given)
    ids = given["input_ids"]
    features = given["visual_feats"]
    if ids is None or ids.dim() != 2 or not ids.numel():
        raise UsageError(f"input_ids has shape {shape_of(ids)}, expected [samples, tokens]")
    if ids.shape[1] > config.max_position_embeddings:
        raise UsageError(
            f"input_ids has {ids.shape[1]} columns, the model only {config.max_position_embeddings}"
            " positions"
        )

    if features is None:
        for name in REGIONAL:
            if given[name] is not None:
                raise UsageError(
                    f"{name} is given without visual_feats [samples, regions, {config.feature_dim}]"
                )
    elif given["visual_pos"] is None:
        raise UsageError(
            "visual_feats is given without visual_pos [samples, regions, 5], the places of the"
            " regions"
        )

    refuse_other_shapes(given, ids.shape, ids.shape[:1], config)


def check_choices(given: Given, config: ModelConfig) -> None:
    """Give the same for text [B, choices, T] and images [B, R, ..] or [B, choices, R, ..], in the
    shapes that the caller knows.
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
    """Raise UsageError for what is no tensor, and for ids that are no integers: as such they would
    be cut off silently.
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
    """Raise UsageError for inputs of other shapes than `text`, and than [*images, R] with the size
    of each behind.
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
    """Give int64 [4]: least and most id, least and most type at the real `tokens` [B, T], or 0,
    which always is in range.
    """
    types = torch.zeros_like(ids) if types is None else types
    return torch.stack(
        [end for values in (ids, types) for end in values.long().where(tokens, 0).aminmax()]
    )


def refuse_unknown_values(ranges: Sequence[int], config: ModelConfig) -> None:
    """Raise UsageError for ids and types outside `value_ranges`: a device stops there for good,
    padded vocabulary passes silently.
    """
    for name, found, size in (
        ("input_ids", ranges[:2], config.vocab_size),
        ("token_type_ids", ranges[2:], config.type_vocab_size),
    ):
        for value in found:
            if not 0 <= value < size:
                raise UsageError(
                    f"{name} holds {value}, expected 0 to {size - 1}: give what the model was"
                    " trained with"
                )


def shape_of(tensor: torch.Tensor | None) -> list[int] | None:
    """Give the shape as a list, None for no tensor."""
    return None if tensor is None else [*tensor.shape]
