"""Which words and regions are hidden, by the paper's rules or the official code's (`--masking`).

paper     MSM: each word is an anchor with p = 0.10; the anchor and the next 0, 1 or 2 words become [MASK].
          MRM: each region is an anchor with p = 0.15; it and every region with IoU > 0.4 to it are hidden.
official  MSM: one span of pieces, start and length uniform (a start at the very end hides nothing; captions under four
          pieces are left alone), 80/10/10 mask/random/keep. MRM: anchors with p = 0.10, IoU >= 0.4.
Two faults of the official code are not carried over: random words are never [PAD] or [unused], and the IoU is that of the
boxes themselves.
"""

from dataclasses import dataclass

import numpy as np

from megatron_interbert.data.randomness import CounterRandom
from megatron_interbert.data.text import CaptionTokenizer, Tokens

WORD_ANCHOR, REGION_ANCHOR, REGION_IOU = 0.10, 0.15, 0.4
OFFICIAL_REGION_ANCHOR = 0.10


@dataclass
class MaskedTokens:
    """ids [T] as the model sees them, and the positions that are targets [M] (they may be shown unchanged)."""

    ids: np.ndarray
    targets: np.ndarray


def mask_tokens(tokens: Tokens, tokenizer: CaptionTokenizer, rules: str, random: CounterRandom) -> MaskedTokens:
    """Hide segments of a caption; `rules` is "paper" or "official"."""
    hide = _paper_segments if rules == "paper" else _official_span
    return hide(tokens, tokenizer, random)


def _paper_segments(tokens: Tokens, tokenizer: CaptionTokenizer, random: CounterRandom) -> MaskedTokens:
    words = int(tokens.words[-1]) + 1 if len(tokens.words) else 0
    anchors = np.flatnonzero(random.uniform(words) < WORD_ANCHOR)
    extra = (random.uniform(words) * 3).astype(int)
    hidden = np.zeros(words, dtype=bool)
    for anchor in anchors:
        hidden[anchor : anchor + 1 + extra[anchor]] = True
    targets = np.flatnonzero(hidden[tokens.words])
    ids = tokens.ids.copy()
    ids[targets] = tokenizer.mask
    return MaskedTokens(ids, targets)


def _official_span(tokens: Tokens, tokenizer: CaptionTokenizer, random: CounterRandom) -> MaskedTokens:
    ids, length = tokens.ids.copy(), len(tokens.ids)
    start, span = random.integer(length + 1), 1 + random.integer(max(length, 1))
    targets = np.arange(start, min(start + span, length)) if length >= 4 else np.zeros(0, dtype=np.int64)
    choice, word = random.uniform(len(targets)), random.uniform(len(targets))
    replaced = tokenizer.ordinary[(word * len(tokenizer.ordinary)).astype(int)]
    ids[targets] = np.where(choice < 0.8, tokenizer.mask, np.where(choice < 0.9, replaced, ids[targets]))
    return MaskedTokens(ids, targets)


def mask_regions(boxes: np.ndarray, rules: str, random: CounterRandom) -> np.ndarray:
    """bool [R]: the regions whose features are zeroed, from boxes [R, 4] x1 y1 x2 y2."""
    draws = random.uniform(len(boxes))
    anchors = draws < (REGION_ANCHOR if rules == "paper" else OFFICIAL_REGION_ANCHOR)
    if not anchors.any():
        return anchors
    overlap = box_iou(boxes[anchors], boxes)
    near = overlap > REGION_IOU if rules == "paper" else overlap >= REGION_IOU
    return anchors | near.any(axis=0)  # the anchor itself, also when its box has no area


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union [A, B] of boxes [A, 4] and [B, 4]; 0 where both have no area."""
    low, high = np.maximum(first[:, None, :2], second[None, :, :2]), np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    area = (first[:, 2:] - first[:, :2]).prod(axis=1)[:, None] + (second[:, 2:] - second[:, :2]).prod(axis=1)[None] - shared
    return shared / np.maximum(area, 1e-12)
