"""Choose the words and regions to mask, for a whole batch at once, by the rules of the paper or of
the official code (`--masking`).

paper: for MSM each word is an anchor with p = 0.10; the anchor and the next 0, 1 or 2 words become
[MASK]. For MRM each region is an anchor with p = 0.15; it and every region whose IoU with it is
above 0.4 are hidden.

official: for MSM one span of pieces with uniform start and length (a start at the very end masks
nothing; captions under four pieces are left alone), 80/10/10 mask/random/keep. For MRM anchors with
p = 0.10, IoU >= 0.4. Two faults of the official code are not reproduced: random words are never
[PAD] or [unused], and the IoU is that of the boxes themselves.

Legend: B samples, T pieces and R regions of all of them end to end, draws [B, n] uniform random
numbers of each sample.
"""

import numpy as np

from megatron_interbert.data.text import CaptionTokenizer, TokenBatch

WORD_ANCHOR = 0.10
REGION_ANCHOR = 0.15
REGION_IOU = 0.4
OFFICIAL_REGION_ANCHOR = 0.10
BLOCK_AREA = (0.1, 0.3)  # of the image
BLOCK_RATIO = 2.0  # of its longer side to the shorter one, at most
BLOCK_DRAWS = 4


def word_draws(max_pieces: int) -> int:
    """Return how many random numbers mask_tokens needs for a sample of at most `max_pieces`."""
    return 2 * max_pieces + 2


def mask_tokens(
    tokens: TokenBatch, tokenizer: CaptionTokenizer, rules: str, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mask words by `rules`, "paper" or "official"; return ids [T] as the model sees them, and
    bool [T], whether each piece is a target (targets may be left unchanged).

    draws [B, word_draws(longest)]: each word (paper) or piece (official) uses two, by its place.
    """
    hide = _paper_segments if rules == "paper" else _official_span
    return hide(tokens, tokenizer, draws)


def within(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sample of each row [rows] and its place in that sample [rows], from offsets
    [B + 1]: [0, 2, 5] -> [0, 0, 1, 1, 1], [0, 1, 0, 1, 2].
    """
    lengths = np.diff(offsets)
    owner = np.repeat(np.arange(len(lengths)), lengths)

    return owner, np.arange(offsets[-1]) - offsets[:-1][owner]


def _paper_segments(
    tokens: TokenBatch, tokenizer: CaptionTokenizer, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    owner, _ = within(tokens.offsets)
    begun = np.concatenate([[0], np.cumsum(tokens.word_starts, dtype=np.int64)])
    word = begun[1:] - 1 - begun[tokens.offsets[:-1]][owner]
    words = begun[tokens.offsets[1:]] - begun[tokens.offsets[:-1]]
    width = int(words.max(initial=0))
    anchors = (draws[:, 0 : 2 * width : 2] < WORD_ANCHOR) & (np.arange(width) < words[:, None])
    more = (draws[:, 1 : 2 * width : 2] * 3).astype(np.int64)
    hidden = anchors.copy()
    for step in (1, 2):
        hidden[:, step:] |= (anchors & (more >= step))[:, :-step]

    targets = hidden[owner, word] if len(word) else np.zeros(0, bool)

    return np.where(targets, tokenizer.mask, tokens.ids), targets


def _official_span(
    tokens: TokenBatch, tokenizer: CaptionTokenizer, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    owner, place = within(tokens.offsets)
    length = np.diff(tokens.offsets)
    start = (draws[:, 0] * (length + 1)).astype(np.int64)
    stop = start + 1 + (draws[:, 1] * np.maximum(length, 1)).astype(np.int64)
    targets = (place >= start[owner]) & (place < stop[owner]) & (length >= 4)[owner]
    choice = draws[owner, 2 + 2 * place]
    word = draws[owner, 3 + 2 * place]
    other = tokenizer.ordinary[(word * len(tokenizer.ordinary)).astype(np.int64)]
    shown = np.where(choice < 0.8, tokenizer.mask, np.where(choice < 0.9, other, tokens.ids))

    return np.where(targets, shown, tokens.ids), targets


def mask_regions(
    boxes: np.ndarray, offsets: np.ndarray, rules: str, draws: np.ndarray
) -> np.ndarray:
    """Choose the regions whose features are zeroed, bool [R], from boxes [R, 4] x1 y1 x2 y2 and
    draws [B, >= most regions of a sample].
    """
    owner, place = within(offsets)
    hidden = draws[owner, place] < (REGION_ANCHOR if rules == "paper" else OFFICIAL_REGION_ANCHOR)
    anchors = np.flatnonzero(hidden)
    if not len(anchors):
        return hidden

    # each sample's boxes side by side
    grid = np.zeros((4, len(offsets) - 1, int(place.max()) + 1), boxes.dtype)
    grid[:, owner, place] = boxes.T
    overlap = iou(boxes[anchors].T[:, :, None], grid[:, owner[anchors]])
    near = overlap > REGION_IOU if rules == "paper" else overlap >= REGION_IOU
    with_anchor, first = np.unique(owner[anchors], return_index=True)
    covered = np.zeros(grid.shape[1:], bool)
    covered[with_anchor] = np.logical_or.reduceat(near, first, axis=0)

    return hidden | covered[owner, place]  # an anchor stays hidden even if its box has no area


def mask_blocks(
    boxes: np.ndarray, sizes: np.ndarray, offsets: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """Choose the regions to hide by a rectangle in each image: all whose middle it holds, else the
    nearest one; bool [R], from boxes [R, 4] in pixels, sizes [B, 2] and draws [B, >= BLOCK_DRAWS].

    Its area is a tenth to three tenths of the image, its sides are at most in the ratio 1 to 2.
    """
    owner, _ = within(offsets)
    area = BLOCK_AREA[0] + (BLOCK_AREA[1] - BLOCK_AREA[0]) * draws[:, 0]
    ratio = BLOCK_RATIO ** (2 * draws[:, 1] - 1)
    sides = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=1)
    low = draws[:, 2:4] * (1 - sides)
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2 / sizes[owner]
    hidden = ((middles >= low[owner]) & (middles < (low + sides)[owner])).all(axis=1)

    far = np.square(middles - (low + sides / 2)[owner]).sum(axis=1)
    for sample in np.flatnonzero(np.bincount(owner, hidden, minlength=len(sizes)) == 0):
        own = slice(offsets[sample], offsets[sample + 1])
        hidden[offsets[sample] + int(far[own].argmin())] = True

    return hidden


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute the intersection over union of boxes, with corners in the first axis [4, ..] and the
    other axes broadcast; 0 if both have no area.
    """
    width = np.minimum(first[2], second[2]) - np.maximum(first[0], second[0])
    height = np.minimum(first[3], second[3]) - np.maximum(first[1], second[1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    areas = (first[2] - first[0]) * (first[3] - first[1]) + (second[2] - second[0]) * (
        second[3] - second[1]
    )

    return shared / np.maximum(areas - shared, 1e-12)


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Compute the areas [R] of boxes [R, 4]."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
