"""Test metrics of ranked lists against brute force and scikit-learn's definitions, by hand."""

import itertools
import math

import numpy as np
import pytest

from megatron_interbert.tasks.shop.figures import (
    auc,
    dcg,
    ndcg,
    order_of,
    recommendation_metrics,
    search_metrics,
)


def test_order_counts_ties_against_the_model():
    scores = np.array([1.0, 3.0, 1.0, 2.0])
    assert order_of(scores, np.array([True, False, False, False])).tolist() == [1, 3, 2, 0]
    assert order_of(np.zeros(3), np.zeros(3, bool)).tolist() == [0, 1, 2]


def test_gains():
    assert dcg(np.array([3.0, 2.0, 0.0, 1.0])) == pytest.approx(
        3 + 2 / math.log2(3) + 1 / math.log2(5)
    )
    assert ndcg(np.array([0, 1, 1]), np.ones(2), 5) == pytest.approx(
        (1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3))
    )
    assert ndcg(np.array([1] * 5), np.ones(9), 5) == 1.0, (
        "at most five can be in the first five places"
    )
    assert ndcg(np.zeros(3), np.zeros(3), 2) == 0.0


def test_search_figures():
    found = [np.array([4, 2, 9]), np.array([1, 0, 3]), np.arange(20), np.array([7])]
    right = [np.array([2]), np.array([1, 3]), np.array([15]), np.array([8])]
    values = search_metrics(found, right)
    assert values["R@1"] == 25.0
    assert values["R@5"] == values["R@10"] == 50.0
    assert values["mean_recall"] == pytest.approx(125 / 3)
    second = (1 + 1 / 2) / (1 + 1 / math.log2(3))
    assert values["nDCG@5"] == pytest.approx(100 * (1 / math.log2(3) + second) / 4)


def test_area_against_all_pairs():
    random = np.random.default_rng(0)
    for _ in range(20):
        scores = random.integers(0, 5, 30).astype(float)
        positive = random.random(30) < 0.3
        pairs = itertools.product(scores[positive], scores[~positive])
        expected = (
            np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]) if positive.any() else math.nan
        )
        assert auc(scores, positive) == pytest.approx(expected, nan_ok=True)

    assert math.isnan(auc(np.ones(3), np.ones(3, bool)))


def test_recommendation_figures_leave_out_topics_that_tell_nothing():
    mixed = (np.array([0.9, 0.5, 0.1]), np.array([False, True, False]))
    nothing = (np.array([1.0, 2.0]), np.array([False, False]))
    values = recommendation_metrics([mixed, nothing], ks=(1, 2))
    assert values["gAUC"] == 50.0
    assert values["AUC"] == pytest.approx(25.0)  # of 0.9, 0.1, 1 and 2 only 0.1 is below 0.5
    assert (values["HR@1"], values["HR@2"]) == (0.0, 100.0)
    assert values["nDCG@2"] == pytest.approx(100 / math.log2(3))
    assert math.isnan(recommendation_metrics([nothing])["gAUC"])
