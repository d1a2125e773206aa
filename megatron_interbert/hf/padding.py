"""Convert padded tensors, as Hugging Face users have them, to a PackedBatch on the same device, and
back.

Legend: B samples, T text columns, R region columns, F feature size; Nt real tokens, Nr real
regions, Ni = B + Nr image tokens (one [IMG] in front of each sample's regions).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.packing import FULL_IMAGE, PackedBatch
from megatron_interbert.hf.checks import (
    check_inputs,
    refuse_empty_samples,
    refuse_unknown_values,
    value_ranges,
)


class PaddedInputs(NamedTuple):
    """Hold inputs by LXMERT's names.

    Real and padded positions may be in any order; what padded ones hold does not matter.
    """

    input_ids: torch.Tensor | None  # [B, T]
    attention_mask: torch.Tensor | None = None  # [B, T], 1 = real; default: all
    token_type_ids: torch.Tensor | None = None  # [B, T]; default: 0
    visual_feats: torch.Tensor | None = None  # [B, R, F]; None: text only
    visual_pos: torch.Tensor | None = None  # [B, R, 5] x1/W, y1/H, x2/W, y2/H, area share
    visual_attention_mask: torch.Tensor | None = None  # [B, R], 1 = real; default: all


@dataclass
class Slots:
    """Hold where packed rows belong in padded tensors, as indexes into their first two axes,
    flattened.
    """

    text: torch.Tensor  # [Nt] in [B, T]
    regions: torch.Tensor  # [Nr] in [B, R]
    image: torch.Tensor  # [Ni] in [B, 1 + R]


OF_TRAINING = (
    "hidden_regions",
    "msm_labels",
    "mrm_class_ids",
    "mrm_class_probs",
    "mismatched",
    "sample_ids",
)


def pack_padded(
    inputs: PaddedInputs, config: ModelConfig, hidden_regions: torch.Tensor | None = None
) -> tuple[PackedBatch, Slots]:
    """Pack real tokens and regions end to end, every word and region a target of its head; return
    the batch and the slots of its rows.

    A token's position is its column, as in BERT. `hidden_regions` [B, R] bool reach the model as
    zeros. Raises UsageError for wrong shapes, for ids that the model does not have, and for a
    sample without a real token or region.
    """
    check_inputs({**inputs._asdict(), "region_mask": hidden_regions}, config)
    ids = inputs.input_ids
    pictured = inputs.visual_feats is not None
    tokens = is_real(inputs.attention_mask, ids)
    regions = (
        is_real(inputs.visual_attention_mask, inputs.visual_feats[..., 0])
        if pictured
        else tokens[:, :0]
    )
    # with a column for [IMG]
    image = torch.cat([torch.ones_like(tokens[:, : int(pictured)]), regions], dim=1)
    lengths = torch.stack([tokens.sum(dim=1), image.sum(dim=1)])
    ranges = value_ranges(ids, inputs.token_type_ids, tokens)
    # the only time that the host waits for the device
    found = torch.cat([lengths.flatten(), ranges]).cpu()
    on_host = found[: -len(ranges)].view_as(lengths)
    refuse_empty_samples(on_host, pictured)
    refuse_unknown_values(found[-len(ranges) :].tolist(), config)
    text_count, image_count = on_host.sum(dim=1).tolist()
    slots = Slots(
        text=real_slots(tokens, text_count),
        regions=real_slots(regions, image_count - len(ids) * pictured),
        image=real_slots(image, image_count),
    )

    batch = PackedBatch(
        **text_tokens(inputs, slots),
        **image_tokens(inputs, config, image, slots, hidden_regions),
        **joint_order(tokens, image, slots),
        text_offsets=offsets(lengths[0]),
        image_offsets=offsets(lengths[1]),
        joint_offsets=offsets(lengths.sum(dim=0)),
        max_text=int(on_host[0].max()),
        max_image=int(on_host[1].max()),
        max_joint=int(on_host.sum(dim=0).max()),
        **dict.fromkeys(OF_TRAINING, slots.text[:0]),
    )

    return batch, slots


def to_padded(rows: torch.Tensor, slots: torch.Tensor, samples: int, columns: int) -> torch.Tensor:
    """Return packed rows [N, ..] at their slots in [samples, columns, ..], zeros elsewhere."""
    padded = rows.new_zeros(samples * columns, *rows.shape[1:])
    return padded.index_copy(0, slots, rows).unflatten(0, (samples, columns))


def joint_order(tokens: torch.Tensor, image: torch.Tensor, slots: Slots) -> dict[str, torch.Tensor]:
    """Return the batch's fields for the joint order, [image tokens, text tokens] of each sample,
    from both masks [B, T] and [B, 1 + R].
    """
    rows = row_numbers(torch.cat([image, tokens], dim=1))
    image_index = rows[:, : image.shape[1]].flatten()[slots.image]
    text_index = rows[:, image.shape[1] :].flatten()[slots.text]
    by_kind = torch.cat([image_index, text_index])
    order = torch.empty_like(by_kind).index_copy_(
        0, by_kind, torch.arange(len(by_kind), device=by_kind.device)
    )

    return {"joint_order": order, "text_index": text_index, "image_index": image_index}


def text_tokens(inputs: PaddedInputs, slots: Slots) -> dict[str, torch.Tensor]:
    """Return the batch's fields of the text side."""
    ids = inputs.input_ids
    types = torch.zeros_like(ids) if inputs.token_type_ids is None else inputs.token_type_ids

    return {
        "token_ids": ids.flatten()[slots.text].long(),
        "token_types": types.flatten()[slots.text].long(),
        "token_positions": slots.text % ids.shape[1],
        "msm_positions": torch.arange(len(slots.text), device=ids.device),
    }


def image_tokens(
    inputs: PaddedInputs,
    config: ModelConfig,
    image: torch.Tensor,
    slots: Slots,
    hidden_regions: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Return the batch's fields of the image side; `image` is its mask [B, 1 + R] with [IMG]."""
    if inputs.visual_feats is None:
        indexes = dict.fromkeys(
            ("region_rows", "region_counts", "summary_rows", "mrm_positions"), slots.image
        )
        floats = torch.zeros(0, 5 + config.feature_dim, device=image.device)
        return {"features": floats[:, 5:], "locations": floats[:, :5], **indexes}

    features = inputs.visual_feats.flatten(0, 1)[slots.regions]
    if hidden_regions is not None:
        features = features.masked_fill(hidden_regions.flatten()[slots.regions, None] != 0, 0.0)

    whole = torch.as_tensor(FULL_IMAGE, device=image.device).expand(len(image), 1, 5)
    locations = torch.cat([whole, inputs.visual_pos.float()], dim=1).flatten(0, 1)[slots.image]
    rows = row_numbers(image)
    region_rows = rows[:, 1:].flatten()[slots.regions]

    return {
        "features": features,
        "locations": locations,
        "region_rows": region_rows,
        "region_counts": image[:, 1:].sum(dim=1),
        "summary_rows": rows[:, 0],
        "mrm_positions": region_rows,
    }


def is_real(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Return a mask as bool [B, columns], on the device of `like`; all True if none is given."""
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.to(like.device) != 0


def real_slots(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Return the flat indexes of the `count` true positions, ascending.

    `nonzero` would have the host wait for the device to count them.
    """
    return mask.flatten().int().argsort(stable=True, descending=True)[:count]


def row_numbers(mask: torch.Tensor) -> torch.Tensor:
    """Return the number of each true position among all true ones, row by row; values at other
    positions are meaningless.
    """
    return (mask.flatten().cumsum(0) - 1).view_as(mask)


def offsets(lengths: torch.Tensor) -> torch.Tensor:
    """Return the offsets, int32 [B + 1], of sequences with lengths [B]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
