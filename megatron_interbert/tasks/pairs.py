"""Frame texts as the model reads them, and lay out batches of text-image pairs; an image's regions
are read once for all its pairs.
"""

from collections.abc import Sequence

import numpy as np

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import image_locations, lay_out
from megatron_interbert.data.region_batch import Allocate, RegionBatch, plain_memory
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.data.training_set import Fields

NOTHING = np.zeros(0, np.int64)
Text = tuple[np.ndarray, np.ndarray]  # token ids with [CLS] and [SEP], and their token types


def caption_texts(
    corpus: Corpus, tokenizer: CaptionTokenizer, captions: np.ndarray, max_tokens: int
) -> list[Text]:
    """Return [CLS] words [SEP] of captions given by their numbers [n], cut to `max_tokens`."""
    tokens = corpus.tokens(captions, tokenizer, max_tokens - 2)
    return [
        frame([ids], tokenizer, max_tokens) for ids in np.split(tokens.ids, tokens.offsets[1:-1])
    ]


def frame(pieces: Sequence[np.ndarray], tokenizer: CaptionTokenizer, max_tokens: int) -> Text:
    """Return (ids, types) of one or two texts, with [CLS] and [SEP].

    While they are too long together, the longer one loses its last token.
    """
    room = max_tokens - 1 - len(pieces)
    lengths = [len(part) for part in pieces]
    while sum(lengths) > room:
        lengths[lengths.index(max(lengths))] -= 1

    ids = [np.array([tokenizer.cls])]
    types = [np.zeros(1, np.int64)]
    for kind, (part, length) in enumerate(zip(pieces, lengths, strict=True)):
        ids += [part[:length], np.array([tokenizer.sep])]
        types.append(np.full(length + 1, kind, np.int64))

    return np.concatenate(ids).astype(np.int64), np.concatenate(types)


def text_fields(texts: Sequence[Text]) -> tuple[Fields, np.ndarray]:
    """Return (token fields of a PackedBatch, lengths [B]) of B texts."""
    lengths = np.array([len(ids) for ids, _ in texts], dtype=np.int64)
    fields = {
        "token_ids": np.concatenate([ids for ids, _ in texts]).astype(np.int64),
        "token_types": np.concatenate([types for _, types in texts]).astype(np.int64),
    }

    return fields, lengths


def pair_fields(
    texts: Sequence[Text],
    regions: RegionBatch | None,
    image_of: np.ndarray,
    feature_dim: int,
    allocate: Allocate = plain_memory,
) -> Fields:
    """Return the fields of a PackedBatch for B pairs without masks.

    `image_of` [B] is the index of each pair's image in `regions`, -1 for a text alone; without
    `regions` all pairs are texts alone.
    """
    fields, lengths = text_fields(texts)
    counts = (
        np.where(image_of < 0, 0, regions.counts[image_of])
        if regions
        else np.zeros(len(texts), np.int64)
    )
    layout = lay_out(lengths, counts)
    ends = np.cumsum(counts)

    if regions:
        rows = np.arange(ends[-1]) + np.repeat(
            regions.offsets[:-1][image_of] - (ends - counts), counts
        )
        features = np.take(
            regions.features, rows, axis=0, out=allocate((len(rows), feature_dim)), mode="clip"
        )
        locations = image_locations(layout, regions.locations()[rows])
    else:
        features = np.empty((0, feature_dim), np.float16)
        locations = np.empty((0, 5), np.float32)

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
