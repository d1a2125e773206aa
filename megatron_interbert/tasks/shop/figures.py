"""Figures of ranked lists.

Ties count against the model: an equal score of a wrong item ranks before the right one.
"""

from collections.abc import Sequence

import numpy as np


def order_of(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Give places from best to worst of `scores` [n]; of equal ones, those that are not `right`
    first, then in order of their numbers.
    """
    return np.lexsort((np.arange(len(scores)), right, -scores))


def dcg(gains: np.ndarray) -> float:
    """Discounted cumulative gain of gains in order."""
    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())


def ndcg(gains: np.ndarray, all_gains: np.ndarray, k: int) -> float:
    """Share of the best possible gain in the first k places: `gains` in the order found, of
    `all_gains` that there are.
    """
    best = dcg(np.sort(all_gains)[::-1][:k])
    return dcg(gains[:k]) / best if best else 0.0


def search_metrics(found: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> dict[str, float]:
    """Of items `found` for each query, best first, and those that are `right`: R@k is the share of
    queries with a right one among the first k, mean_recall the mean of R@1, R@5 and R@10 (MUGE),
    nDCG@5 that of KDD Cup 2020; in per cent.
    """
    hits = [np.isin(items, of_query) for items, of_query in zip(found, right, strict=True)]
    values = {f"R@{k}": 100.0 * float(np.mean([hit[:k].any() for hit in hits])) for k in (1, 5, 10)}
    values["mean_recall"] = float(np.mean(list(values.values())))
    values["nDCG@5"] = 100.0 * float(
        np.mean([ndcg(hit, np.ones(len(of)), 5) for hit, of in zip(hits, right, strict=True)])
    )

    return values


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties
    counted half. NaN without both kinds.
    """
    positives = int(positive.sum())
    negatives = int((~positive).sum())
    if not positives or not negatives:
        return float("nan")

    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean_rank = (ends - (counts - 1) / 2)[place]

    return float(
        (mean_rank[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    )


def recommendation_metrics(
    groups: Sequence[tuple[np.ndarray, np.ndarray]], ks: Sequence[int] = (5, 10)
) -> dict[str, float]:
    """Of (scores, clicked) of each topic's showings: AUC over all of them, its mean over topics
    (gAUC), nDCG@k and hit rate@k, in per cent. Topics without a click, or with nothing else, count
    in the first only.
    """
    scores, clicked = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    values = {"AUC": 100.0 * auc(scores, clicked)}
    mixed = [(s, c) for s, c in groups if c.any() and not c.all()]
    values["gAUC"] = (
        100.0 * float(np.mean([auc(s, c) for s, c in mixed])) if mixed else float("nan")
    )
    ordered = [c[order_of(s, c)].astype(float) for s, c in mixed]

    for k in ks:
        values[f"nDCG@{k}"] = (
            100.0 * float(np.mean([ndcg(gains, gains, k) for gains in ordered]))
            if mixed
            else float("nan")
        )

        values[f"HR@{k}"] = (
            100.0 * float(np.mean([gains[:k].any() for gains in ordered]))
            if mixed
            else float("nan")
        )

    return values
