"""Pack samples into a PackedBatch: flat tensors with offsets and no padding.

Legend: B samples, Nt text tokens, Ni image tokens (per sample one [IMG], then the regions), N = Nt
+ Ni, R regions, F feature size, Mt and Mr masked tokens and regions that are targets, k soft-label
entries.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

FULL_IMAGE = np.array([[0.0, 0.0, 1.0, 1.0, 1.0]], dtype=np.float32)


@dataclass
class Example:
    """Hold one sample before packing. token_ids include [CLS] and [SEP]; a sample without features
    is text only.
    """

    token_ids: np.ndarray
    token_types: np.ndarray
    features: np.ndarray | None = None
    locations: np.ndarray | None = None
    class_ids: np.ndarray | None = None
    class_probs: np.ndarray | None = None
    hidden_regions: np.ndarray | None = None
    msm_positions: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    msm_labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    mismatched: int = 0
    sample_id: int = 0


def no_indexes() -> torch.Tensor:
    """Return an empty tensor of indexes, int64 [0]."""
    return torch.zeros(0, dtype=torch.int64)


def no_scores() -> torch.Tensor:
    """Return an empty tensor of scores, float32 [0]."""
    return torch.zeros(0)


@dataclass
class PackedBatch:
    """Hold a batch; see the legend above. Indexes are int64, offsets int32, features float16 as
    stored.
    """

    token_ids: torch.Tensor  # [Nt]
    token_types: torch.Tensor  # [Nt]
    token_positions: torch.Tensor  # [Nt] place of each token in its own caption
    text_offsets: torch.Tensor  # [B+1]
    image_offsets: torch.Tensor  # [B+1] over image tokens
    joint_offsets: torch.Tensor  # [B+1] over both
    joint_order: torch.Tensor  # [N] from cat(image, text) to per-sample [image tokens, text tokens]
    text_index: torch.Tensor  # [Nt] places of the text tokens in the joint order
    image_index: torch.Tensor  # [Ni] places of the image tokens in the joint order
    features: torch.Tensor  # [R, F]
    region_rows: torch.Tensor  # [R] image token of each region
    region_counts: torch.Tensor  # [B with image] regions of each image
    summary_rows: torch.Tensor  # [B with image] image token [IMG] of each image
    locations: torch.Tensor  # [Ni, 5] x1/W, y1/H, x2/W, y2/H, area share; [IMG] is (0,0,1,1,1)
    hidden_regions: torch.Tensor  # [hidden] regions whose features are zeroed
    msm_positions: torch.Tensor  # [Mt] text tokens that are targets
    msm_labels: torch.Tensor  # [Mt]
    # [Mr] image tokens that are targets: hidden regions of matched samples
    mrm_positions: torch.Tensor
    mrm_class_ids: torch.Tensor  # [Mr, k]
    mrm_class_probs: torch.Tensor  # [Mr, k]
    mismatched: torch.Tensor  # [B] 0 = matched, the class index of the matching head
    sample_ids: torch.Tensor  # [B]
    mrm_regions: torch.Tensor = field(default_factory=no_indexes)  # [Mr] the same as regions
    # [Ma] which of the same regions have known attributes, these, and their probabilities
    mrm_attribute_rows: torch.Tensor = field(default_factory=no_indexes)
    mrm_attribute_ids: torch.Tensor = field(default_factory=no_indexes)
    mrm_attribute_probs: torch.Tensor = field(default_factory=no_scores)
    # the right answers of a downstream task
    labels: torch.Tensor = field(default_factory=no_indexes)
    # [labels] for a task with several answers to a sample: the sample and the score of each
    label_owner: torch.Tensor = field(default_factory=no_indexes)
    label_scores: torch.Tensor = field(default_factory=no_scores)
    # [C] image tokens of the regions that samples choose among, the sample of each, its place among
    # that sample's, and how right it is
    candidates: torch.Tensor = field(default_factory=no_indexes)
    candidate_owner: torch.Tensor = field(default_factory=no_indexes)
    candidate_place: torch.Tensor = field(default_factory=no_indexes)
    candidate_scores: torch.Tensor = field(default_factory=no_scores)
    # [P] text and image sample of each pair to judge; if empty, pair i is the text and image of
    # sample i
    pair_text: torch.Tensor = field(default_factory=no_indexes)
    pair_image: torch.Tensor = field(default_factory=no_indexes)
    # [Q, I] for a batch whose last Q * I pairs are Q texts with each of I images: True for images
    # that a text must not choose
    no_choice: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    # the downstream task whose head the batch is for, or the only objective of pretraining
    head: str = ""
    max_text: int = 0  # most tokens of a text, of an image, and of both together in a sample
    max_image: int = 0
    max_joint: int = 0
    max_candidates: int = 0

    def __len__(self) -> int:
        return len(self.text_offsets) - 1

    def _map(self, function) -> "PackedBatch":
        return PackedBatch(
            **{
                f.name: function(v) if isinstance(v := getattr(self, f.name), torch.Tensor) else v
                for f in dataclasses.fields(self)
            }
        )

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch on a device; copies from pinned memory do not block."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        """Return the batch in pinned memory."""
        return self._map(torch.Tensor.pin_memory)

    def target_counts(self) -> torch.Tensor:
        """Count the targets of MSM, MRM and ITM in this batch, float64 [3]."""
        return torch.tensor(
            [len(self.msm_labels), len(self.mrm_positions), len(self.summary_rows)],
            dtype=torch.float64,
        )


def normalised_locations(boxes: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """Compute x1/W, y1/H, x2/W, y2/H, area/(W*H), float32 [R, 5], of boxes [R, 4] in pixels."""
    unit = boxes / np.array([*size, *size], dtype=np.float32)
    area = (unit[:, 2] - unit[:, 0]) * (unit[:, 3] - unit[:, 1])
    return np.concatenate([unit, area[:, None]], axis=1).astype(np.float32)


def lay_out(text_lengths: np.ndarray, region_counts: np.ndarray) -> dict[str, np.ndarray | int]:
    """Compute the index fields of a PackedBatch from the tokens and regions of each sample [B].

    All index work is done in the loader processes.
    """
    image_lengths = region_counts + (region_counts > 0)
    text_offsets = _offsets(text_lengths)
    image_offsets = _offsets(image_lengths)
    joint_offsets = text_offsets + image_offsets
    image_index = _within(image_lengths) + np.repeat(joint_offsets[:-1], image_lengths)
    token_positions = _within(text_lengths)
    text_index = token_positions + np.repeat(joint_offsets[:-1] + image_lengths, text_lengths)
    joint_order = np.empty(joint_offsets[-1], dtype=np.int64)
    joint_order[np.concatenate([image_index, text_index])] = np.arange(joint_offsets[-1])
    counts = region_counts[region_counts > 0]
    summary_rows = image_offsets[:-1][region_counts > 0]

    return {
        "token_positions": token_positions,
        "text_offsets": text_offsets.astype(np.int32),
        "image_offsets": image_offsets.astype(np.int32),
        "joint_offsets": joint_offsets.astype(np.int32),
        "joint_order": joint_order,
        "text_index": text_index,
        "image_index": image_index,
        "region_rows": _within(counts) + np.repeat(summary_rows + 1, counts),
        "region_counts": counts,
        "summary_rows": summary_rows,
        "max_text": int(text_lengths.max()),
        "max_image": int(image_lengths.max()),
        "max_joint": int((text_lengths + image_lengths).max()),
    }


def image_locations(layout: dict[str, np.ndarray | int], regions: np.ndarray) -> np.ndarray:
    """Extend the locations of the regions [R, 5] to all image tokens, float32 [Ni, 5]."""
    locations = np.empty((int(layout["image_offsets"][-1]), 5), np.float32)
    locations[layout["summary_rows"]] = FULL_IMAGE
    locations[layout["region_rows"]] = regions
    return locations


def to_batch(fields: dict[str, np.ndarray | int | str]) -> PackedBatch:
    """Build a PackedBatch from arrays by field name, without copying them."""
    return PackedBatch(
        **{
            name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
            for name, v in fields.items()
        }
    )


def pack(examples: Sequence[Example], feature_dim: int) -> PackedBatch:
    """Pack samples end to end into one batch."""
    text_lengths = np.array([len(e.token_ids) for e in examples])
    region_counts = np.array([0 if e.features is None else len(e.features) for e in examples])
    layout = lay_out(text_lengths, region_counts)
    pictured = [e for e in examples if e.features is not None]
    hidden = np.concatenate(
        [
            e.hidden_regions if e.hidden_regions is not None else np.zeros(len(e.features), bool)
            for e in pictured
        ]
        or [np.zeros(0, bool)]
    )
    is_target = hidden & np.repeat(
        [e.mismatched == 0 for e in pictured], layout["region_counts"]
    ).astype(bool)
    width = max((e.class_ids.shape[1] for e in pictured if e.class_ids is not None), default=1)
    labelled = all(e.class_ids is not None for e in pictured)
    starts = layout["text_offsets"][:-1]

    return to_batch(
        {
            **layout,
            "token_ids": _join([e.token_ids for e in examples], np.int64),
            "token_types": _join([e.token_types for e in examples], np.int64),
            "features": _join([e.features for e in pictured], np.float16, (feature_dim,)),
            "locations": image_locations(
                layout, _join([e.locations for e in pictured], np.float32, (5,))
            ),
            "hidden_regions": np.flatnonzero(hidden),
            "msm_positions": _join(
                [e.msm_positions + start for e, start in zip(examples, starts, strict=True)],
                np.int64,
            ),
            "msm_labels": _join([e.msm_labels for e in examples], np.int64),
            "mrm_positions": (
                layout["region_rows"][is_target] if labelled else np.zeros(0, np.int64)
            ),
            "mrm_regions": np.flatnonzero(is_target) if labelled else np.zeros(0, np.int64),
            "mrm_class_ids": _join(
                [e.class_ids for e in pictured] if labelled else [], np.int64, (width,), is_target
            ),
            "mrm_class_probs": _join(
                [e.class_probs for e in pictured] if labelled else [],
                np.float32,
                (width,),
                is_target,
            ),
            "mismatched": np.array([e.mismatched for e in examples]),
            "sample_ids": np.array([e.sample_id for e in examples]),
        }
    )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _within(lengths: np.ndarray) -> np.ndarray:
    """Count 0, 1, .. in each run of the given length: [2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(lengths.sum()) - np.repeat(_offsets(lengths)[:-1], lengths)


def _join(
    parts: list[np.ndarray], dtype: type, tail: tuple[int, ...] = (), keep: np.ndarray | None = None
) -> np.ndarray:
    joined = (
        np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros((0, *tail), dtype)
    )
    return joined if keep is None or not parts else joined[keep]
