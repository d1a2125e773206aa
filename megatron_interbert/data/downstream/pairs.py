"""A batch of pairs of a text and an image: the images of a batch are read once, however many pairs they are in."""

from collections.abc import Sequence

import numpy as np

from megatron_interbert.data.packing import image_locations, lay_out
from megatron_interbert.data.region_batch import Allocate, RegionBatch, plain_memory
from megatron_interbert.data.training_set import Fields

NOTHING = np.zeros(0, np.int64)


def text_fields(texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Fields, np.ndarray]:
    """(token fields, lengths [B]) of texts given as (ids with [CLS] and [SEP], types)."""
    lengths = np.array([len(ids) for ids, _ in texts], dtype=np.int64)
    fields = {
        "token_ids": np.concatenate([ids for ids, _ in texts]).astype(np.int64),
        "token_types": np.concatenate([types for _, types in texts]).astype(np.int64),
    }
    return fields, lengths


def pair_fields(
    texts: Sequence[tuple[np.ndarray, np.ndarray]],
    regions: RegionBatch | None,
    image_of: np.ndarray,
    feature_dim: int,
    allocate: Allocate = plain_memory,
) -> Fields:
    """The fields of a PackedBatch for B pairs without masks: texts [B] and the place of each pair's image in `regions` [B]; text
    alone without regions."""
    fields, lengths = text_fields(texts)
    counts = regions.counts[image_of] if regions else np.zeros(len(texts), np.int64)
    layout = lay_out(lengths, counts)
    ends = np.cumsum(counts)
    if regions:
        rows = np.arange(ends[-1]) + np.repeat(regions.offsets[:-1][image_of] - (ends - counts), counts)
        features = np.take(regions.features, rows, axis=0, out=allocate((len(rows), feature_dim)), mode="clip")
        locations = image_locations(layout, regions.locations()[rows])
    else:
        features, locations = np.empty((0, feature_dim), np.float16), np.empty((0, 5), np.float32)
    return {
        **layout,
        **fields,
        "features": features,
        "locations": locations,
        "hidden_regions": NOTHING,
        "msm_positions": NOTHING,
        "msm_labels": NOTHING,
        "mrm_positions": NOTHING,
        "mrm_class_ids": np.zeros((0, 1), np.int64),
        "mrm_class_probs": np.zeros((0, 1), np.float32),
        "mismatched": np.zeros(len(texts), np.int64),
        "sample_ids": np.arange(len(texts)),
    }
