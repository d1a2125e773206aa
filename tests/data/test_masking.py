"""Masking is what it says: measured rates over 100,000 samples against the rules, for both modes."""

import numpy as np
import pytest

from megatron_interbert.data.masking import box_iou, mask_regions, mask_tokens
from megatron_interbert.data.randomness import CounterRandom
from megatron_interbert.data.text import CaptionTokenizer, Tokens
from tests.corpus import VOCABULARY

SAMPLES = 100_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return CaptionTokenizer(str(path))


def caption(length):
    """Words that are all different and ordinary, one piece each."""
    return Tokens(np.arange(6, 6 + length) % len(VOCABULARY), np.arange(length))


def target_shares(tokenizer, rules, length):
    """Share of samples in which each position is a target, [length]."""
    counts = np.zeros(length)
    for sample in range(SAMPLES):
        counts[mask_tokens(caption(length), tokenizer, rules, CounterRandom(1, 3, 0, sample)).targets] += 1
    return counts / SAMPLES


def test_paper_segments_hide_each_position_at_its_rate(tokenizer):
    """Anchors 0.10, one to three words each: 0.10 at the first word, 0.16 at the second, 0.188 further on; 17 % overall."""
    shares = target_shares(tokenizer, "paper", 10)
    first, second = 0.1, 1 - 0.9 * (1 - 0.1 * 2 / 3)
    later = 1 - 0.9 * (1 - 0.1 * 2 / 3) * (1 - 0.1 / 3)
    np.testing.assert_allclose(shares, [first, second] + [later] * 8, atol=0.005)
    assert 0.165 < shares.mean() < 0.185


def test_official_span_hides_a_third_and_is_sometimes_empty(tokenizer):
    """Start uniform in 0..n, length uniform in 1..n, cut at the end. Counted exactly over all pairs for n = 10."""
    length = 10
    exact = np.zeros(length)
    for start in range(length + 1):
        for span in range(1, length + 1):
            exact[start : start + span] += 1 / (length * (length + 1))
    np.testing.assert_allclose(target_shares(tokenizer, "official", length), exact, atol=0.005)
    assert 0.30 < exact.mean() < 0.37
    empty = np.mean(
        [not len(mask_tokens(caption(length), tokenizer, "official", CounterRandom(1, 3, 0, s)).targets) for s in range(20000)]
    )
    assert abs(empty - 1 / 11) < 0.01


def test_official_replacement_is_80_10_10_and_never_special(tokenizer):
    outcome, replaced = np.zeros(3), set()
    for sample in range(SAMPLES):
        shown = mask_tokens(caption(8), tokenizer, "official", CounterRandom(2, 3, 0, sample))
        original, now = caption(8).ids[shown.targets], shown.ids[shown.targets]
        outcome += [(now == tokenizer.mask).sum(), ((now != tokenizer.mask) & (now != original)).sum(), (now == original).sum()]
        replaced |= set(now[(now != tokenizer.mask) & (now != original)])
    kept = 0.1 + 0.1 / len(tokenizer.ordinary)  # a random word is sometimes the same one
    np.testing.assert_allclose(outcome / outcome.sum(), [0.8, 0.2 - kept, kept], atol=0.005)
    assert replaced == {VOCABULARY.index(w) for w in VOCABULARY if not w.startswith("[")}


def test_paper_segments_take_whole_words_and_only_mask(tokenizer):
    pieces = Tokens(np.array([6, 7, 8, 9, 10, 11]), np.array([0, 1, 1, 1, 2, 3]))
    for sample in range(2000):
        shown = mask_tokens(pieces, tokenizer, "paper", CounterRandom(3, 3, 0, sample))
        inside = np.isin([1, 2, 3], shown.targets)
        assert inside.all() or not inside.any()
        assert (shown.ids[shown.targets] == tokenizer.mask).all()
        untouched = np.setdiff1d(np.arange(6), shown.targets)
        assert (shown.ids[untouched] == pieces.ids[untouched]).all()


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("rules", ["paper", "official"])
def test_short_captions_do_not_fail(tokenizer, rules, length):
    for sample in range(200):
        assert len(mask_tokens(caption(length), tokenizer, rules, CounterRandom(4, 3, 0, sample)).ids) == length


def iou_by_pixels(first, second):
    grid = np.zeros((60, 60), dtype=int)
    for bit, (x1, y1, x2, y2) in ((1, first), (2, second)):
        grid[y1:y2, x1:x2] |= bit
    return (grid == 3).sum() / max((grid > 0).sum(), 1)


def test_iou_equals_counted_pixels():
    random = np.random.default_rng(0)
    boxes = np.sort(random.integers(0, 60, size=(40, 2, 2)), axis=1).reshape(40, 4)
    overlap = box_iou(boxes.astype(np.float32), boxes.astype(np.float32))
    for i in range(40):
        for j in range(40):
            assert abs(overlap[i, j] - iou_by_pixels(boxes[i], boxes[j])) < 1e-6


@pytest.mark.parametrize(("rules", "rate"), [("paper", 0.15), ("official", 0.10)])
def test_regions_apart_are_hidden_at_the_anchor_rate(rules, rate):
    apart = np.array([[i * 10, 0, i * 10 + 5, 5] for i in range(10)], dtype=np.float32)
    share = np.mean([mask_regions(apart, rules, CounterRandom(5, 4, 0, s)).mean() for s in range(SAMPLES)])
    assert abs(share - rate) < 0.005


@pytest.mark.parametrize(("rules", "rate"), [("paper", 0.15), ("official", 0.10)])
def test_no_visible_region_overlaps_an_anchor(rules, rate):
    """Anchors are known from the same draws; every region beyond the threshold is hidden, and no other one."""
    random = np.random.default_rng(1)
    for sample in range(SAMPLES):
        corner = random.uniform(0, 50, size=(12, 2))
        boxes = np.concatenate([corner, corner + random.uniform(10, 50, size=(12, 2))], axis=1).astype(np.float32)
        anchors = CounterRandom(6, 4, 0, sample).uniform(12) < rate
        hidden = mask_regions(boxes, rules, CounterRandom(6, 4, 0, sample))
        overlap = box_iou(boxes[anchors], boxes)
        beyond = overlap > 0.4 if rules == "paper" else overlap >= 0.4
        assert (hidden == (anchors | beyond.any(axis=0))).all()


def test_a_box_without_area_can_be_an_anchor():
    point = np.tile([[3.0, 3.0, 3.0, 3.0]], (200, 1)).astype(np.float32)
    assert mask_regions(point, "paper", CounterRandom(7, 4, 0, 0)).any()
