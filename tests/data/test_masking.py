"""Test masking: rates measured over 100,000 samples against the rules, for both modes."""

import numpy as np
import pytest

from megatron_interbert.data.masking import iou, mask_regions, mask_tokens, word_draws
from megatron_interbert.data.randomness import uniforms
from megatron_interbert.data.text import CaptionTokenizer, TokenBatch
from tests.corpus import VOCABULARY

SAMPLES = 100_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return CaptionTokenizer(str(path))


def captions(length, count):
    """Make `count` captions of different ordinary words, one piece each."""
    ids = np.tile(np.arange(6, 6 + length) % len(VOCABULARY), count)
    return TokenBatch(ids, np.ones(len(ids), np.uint8), np.arange(count + 1) * length)


def draws(seed, count, width):
    return uniforms(seed, np.zeros(count, int), np.arange(count), [(3, 0, width)])[0]


def masked(tokenizer, rules, length, count=SAMPLES, seed=1):
    """Mask captions; return (ids, targets), both [count, length]."""
    ids, targets = mask_tokens(
        captions(length, count), tokenizer, rules, draws(seed, count, word_draws(length))
    )
    return ids.reshape(count, length), targets.reshape(count, length)


def test_paper_segments_hide_each_position_at_its_rate(tokenizer):
    """Check anchors at a rate of 0.10, of one to three words each: this hides 0.10 at the first
    word, 0.16 at the second and 0.188 further on, 17 % overall.
    """
    shares = masked(tokenizer, "paper", 10)[1].mean(axis=0)
    first = 0.1
    second = 1 - 0.9 * (1 - 0.1 * 2 / 3)
    later = 1 - 0.9 * (1 - 0.1 * 2 / 3) * (1 - 0.1 / 3)
    np.testing.assert_allclose(shares, [first, second] + [later] * 8, atol=0.005)
    assert 0.165 < shares.mean() < 0.185


def test_official_span_hides_a_third_and_is_sometimes_empty(tokenizer):
    """Check a start uniform in 0..n and a length uniform in 1..n, cut at the end, against an exact
    count over all pairs for n = 10.
    """
    length = 10
    exact = np.zeros(length)
    for start in range(length + 1):
        for span in range(1, length + 1):
            exact[start : start + span] += 1 / (length * (length + 1))

    targets = masked(tokenizer, "official", length)[1]
    np.testing.assert_allclose(targets.mean(axis=0), exact, atol=0.005)
    assert 0.30 < exact.mean() < 0.37
    assert abs((~targets.any(axis=1)).mean() - 1 / 11) < 0.01
    edges = np.abs(np.diff(np.pad(targets, ((0, 0), (1, 1))).astype(int), axis=1)).sum(axis=1)
    assert edges.max() == 2, "one span"


def test_official_replacement_is_80_10_10_and_never_special(tokenizer):
    ids, targets = masked(tokenizer, "official", 8, seed=2)
    original = np.tile(captions(8, 1).ids, (SAMPLES, 1))[targets]
    now = ids[targets]
    changed = (now != tokenizer.mask) & (now != original)
    outcome = np.array([(now == tokenizer.mask).mean(), changed.mean(), (now == original).mean()])
    kept = 0.1 + 0.1 / len(tokenizer.ordinary)  # a random word is sometimes the original
    np.testing.assert_allclose(outcome, [0.8, 0.2 - kept, kept], atol=0.005)
    assert set(now[changed]) == {VOCABULARY.index(w) for w in VOCABULARY if not w.startswith("[")}


def test_paper_segments_take_whole_words_and_only_mask(tokenizer):
    count = 2000
    ids = np.tile([6, 7, 8, 9, 10, 11], count)
    starts = np.tile([1, 1, 0, 0, 1, 1], count).astype(np.uint8)
    pieces = TokenBatch(ids, starts, np.arange(count + 1) * 6)
    shown, targets = mask_tokens(pieces, tokenizer, "paper", draws(3, count, word_draws(6)))
    inside = targets.reshape(count, 6)[:, 1:4]
    assert (inside.all(axis=1) == inside.any(axis=1)).all()
    assert inside.any()
    assert (shown[targets] == tokenizer.mask).all()
    assert (shown[~targets] == ids[~targets]).all()


@pytest.mark.parametrize("rules", ["paper", "official"])
def test_captions_of_any_length_in_one_batch_are_masked_as_alone(tokenizer, rules):
    lengths = np.array([0, 1, 2, 7, 0, 12, 3] * 50)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    random = np.random.default_rng(0)
    starts = random.integers(0, 2, offsets[-1]).astype(np.uint8)
    starts[offsets[:-1][lengths > 0]] = 1
    whole = TokenBatch(random.integers(6, 20, offsets[-1]), starts, offsets)
    numbers = draws(4, len(lengths), word_draws(12))
    ids, targets = mask_tokens(whole, tokenizer, rules, numbers)

    for i in range(len(lengths)):
        alone = whole.take(np.array([i]), 12)
        expected = mask_tokens(alone, tokenizer, rules, numbers[i : i + 1])
        np.testing.assert_array_equal(ids[offsets[i] : offsets[i + 1]], expected[0])
        np.testing.assert_array_equal(targets[offsets[i] : offsets[i + 1]], expected[1])


def iou_by_pixels(first, second):
    grid = np.zeros((60, 60), dtype=int)
    for bit, (x1, y1, x2, y2) in ((1, first), (2, second)):
        grid[y1:y2, x1:x2] |= bit
    return (grid == 3).sum() / max((grid > 0).sum(), 1)


def test_iou_equals_counted_pixels():
    random = np.random.default_rng(0)
    boxes = np.sort(random.integers(0, 60, size=(40, 2, 2)), axis=1).reshape(40, 4)
    corners = boxes.T.astype(np.float32)
    overlap = iou(corners[:, :, None], corners[:, None, :])
    for i in range(40):
        for j in range(40):
            assert abs(overlap[i, j] - iou_by_pixels(boxes[i], boxes[j])) < 1e-6


@pytest.mark.parametrize(("rules", "rate"), [("paper", 0.15), ("official", 0.10)])
def test_regions_apart_are_hidden_at_the_anchor_rate(rules, rate):
    apart = np.array([[i * 10, 0, i * 10 + 5, 5] for i in range(10)], dtype=np.float32)
    hidden = mask_regions(
        np.tile(apart, (SAMPLES, 1)), np.arange(SAMPLES + 1) * 10, rules, draws(5, SAMPLES, 10)
    )
    assert abs(hidden.mean() - rate) < 0.005


@pytest.mark.parametrize(("rules", "rate"), [("paper", 0.15), ("official", 0.10)])
def test_what_overlaps_an_anchor_is_hidden_and_nothing_else(rules, rate):
    """Check images of 1 to 12 regions in one batch against a loop over pairs of boxes."""
    random = np.random.default_rng(1)
    counts = random.integers(1, 13, 3000)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    corner = random.uniform(0, 50, size=(offsets[-1], 2))
    boxes = np.concatenate(
        [corner, corner + random.uniform(10, 50, size=(offsets[-1], 2))], axis=1
    ).astype(np.float32)
    numbers = draws(6, len(counts), 12)
    hidden = mask_regions(boxes, offsets, rules, numbers)
    seen = 0

    for i, count in enumerate(counts):
        mine = boxes[offsets[i] : offsets[i + 1]]
        anchors = numbers[i, :count] < rate
        for j in range(count):
            overlaps = [float(iou(mine[j], mine[a])) for a in np.flatnonzero(anchors)]
            near = any(o > 0.4 if rules == "paper" else o >= 0.4 for o in overlaps)
            assert hidden[offsets[i] + j] == (anchors[j] or near)
            seen += near and not anchors[j]

    assert seen > 100


def test_a_box_without_area_can_be_an_anchor():
    point = np.tile([[3.0, 3.0, 3.0, 3.0]], (200, 1)).astype(np.float32)
    assert mask_regions(point, np.array([0, 200]), "paper", draws(7, 1, 200)).any()
