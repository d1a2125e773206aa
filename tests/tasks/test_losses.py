"""Test the soft-label divergence, losses over the global count, and retrieval metrics against plain
arithmetic.
"""

import numpy as np
import pytest
import torch

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.pretraining.region_losses import hard_label, soft_label_kl
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.tasks.retrieval.job import ranks, recall_metrics, retrieval_metrics


def dense_label(ids, probs, classes):
    """Return the distribution that top-k entries stand for: the probability left over is spread
    over the other classes.
    """
    dense = torch.full(
        (classes,), float((1 - probs.double().sum()) / (classes - len(ids))), dtype=torch.float64
    )
    dense[ids] = probs.double()

    return dense


@pytest.mark.parametrize("k", [1, 3, 11])
def test_divergence_of_top_k_labels_equals_the_dense_one(k):
    torch.manual_seed(0)
    classes = 12
    rows = 7
    logits = torch.randn(rows, classes) * 5
    ids = torch.stack([torch.randperm(classes)[:k] for _ in range(rows)])
    probs = torch.rand(rows, k + 1).softmax(1)[:, :k]
    expected = [
        torch.nn.functional.kl_div(
            logits[i].double().log_softmax(0),
            dense_label(ids[i], probs[i], classes),
            reduction="sum",
        )
        for i in range(rows)
    ]
    torch.testing.assert_close(
        soft_label_kl(logits, ids, probs), torch.stack(expected).float(), rtol=1e-5, atol=1e-5
    )


def test_divergence_of_whole_distributions():
    torch.manual_seed(1)
    logits = torch.randn(4, 9)
    probs = torch.rand(4, 9).softmax(1)
    probs[0] = torch.nn.functional.one_hot(torch.tensor(3), 9)  # p log p is 0 for p = 0
    expected = torch.nn.functional.kl_div(logits.log_softmax(1), probs, reduction="none").sum(1)
    torch.testing.assert_close(soft_label_kl(logits, torch.arange(9).expand(4, 9), probs), expected)
    assert (
        soft_label_kl(probs.log().clamp(min=-80), torch.arange(9).expand(4, 9), probs).abs().max()
        < 1e-5
    ), "0 where equal"


def test_divergence_has_its_minimum_at_the_label():
    logits = torch.zeros(1, 6, requires_grad=True)
    ids = torch.tensor([[2, 4]])
    probs = torch.tensor([[0.6, 0.2]])
    for _ in range(3000):
        (gradient,) = torch.autograd.grad(soft_label_kl(logits, ids, probs).sum(), logits)
        logits = (logits - gradient).detach().requires_grad_()

    torch.testing.assert_close(
        logits.softmax(1)[0], torch.tensor([0.05, 0.05, 0.6, 0.05, 0.2, 0.05]), rtol=1e-3, atol=1e-4
    )


def test_the_hard_label_is_the_most_likely_class():
    assert hard_label(
        torch.tensor([[4, 7], [1, 2]]), torch.tensor([[0.2, 0.5], [0.9, 0.1]])
    ).tolist() == [7, 1]


def test_figures_of_a_report():
    values = PretrainingTask().metrics(
        torch.tensor([[6.0, 1.0, 4.0], [0.0, 0.0, 0.0], [3.0, 2.0, 2.0]])
    )
    assert (
        values["msm_loss"],
        values["msm_accuracy"],
        values["mrm_loss"],
        values["itm_loss"],
        values["loss"],
    ) == (
        1.5,
        0.25,
        0,
        1.5,
        3,
    )


def brute_force_rank(scores, right):
    # among equal scores, wrong ones come first
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], right[i]))
    return 1 + next(place for place, i in enumerate(order) if right[i])


def test_ranks_equal_a_full_sort_with_ties():
    random = np.random.default_rng(0)
    scores = random.integers(0, 6, size=(200, 30)).astype(np.float32)
    right = random.random((200, 30)) < 0.1
    right[np.arange(200), random.integers(0, 30, 200)] = True
    expected = [brute_force_rank(s, r) for s, r in zip(scores, right, strict=True)]
    # Wrong candidates with the score of the best right one rank before it; other right ones do not
    # count against it.
    got = ranks(scores, right)
    assert got.tolist() == expected


def test_recall_in_both_directions():
    # captions x images
    scores = np.array([[9, 1, 0], [2, 8, 3], [7, 6, 5], [0, 0, 4]], dtype=np.float32)
    metrics = retrieval_metrics(scores, np.array([0, 1, 2, 2]))
    assert metrics["text_to_image"]["R@1"] == 75.0
    assert metrics["text_to_image"]["mean_rank"] == (1 + 1 + 3 + 1) / 4
    assert metrics["image_to_text"]["R@1"] == 100.0
    assert recall_metrics(np.array([1, 6, 11]))["R@10"] == pytest.approx(200 / 3)


def test_scores_that_are_not_finite_are_no_perfect_ranking():
    with pytest.raises(UsageError, match="not finite"):
        retrieval_metrics(np.full((3, 3), np.nan, np.float32), np.arange(3))


def test_untrained_objectives_are_reported_but_not_summed():
    report = torch.tensor([[6.0, 1.0, 4.0], [5.0, 0.0, 1.0], [3.0, 2.0, 2.0]])
    values = PretrainingTask(RunConfig(objectives="itm")).metrics(report)
    assert (values["loss"], values["mrm_loss"]) == (1.5, 5.0)
