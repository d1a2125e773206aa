"""Compute metrics of ranked lists.

Ties count against the model: a wrong item with an equal score ranks before the right one.
"""

from collections.abc import Sequence

import numpy as np


def order_of(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the indices of `scores` [n] from best to worst; among equal scores, items that are not
    `right` come first, then lower indices.
    """
    return np.lexsort((np.arange(len(scores)), right, -scores))


def dcg(gains: np.ndarray) -> float:
    """Return the discounted cumulative gain of gains in ranked order."""
    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())


def ndcg(gains: np.ndarray, all_gains: np.ndarray, k: int) -> float:
    """Return the nDCG@k of `gains` in ranked order, relative to the best order of `all_gains`; 0 if
    there is nothing to gain.
    """
    best = dcg(np.sort(all_gains)[::-1][:k])
    return dcg(gains[:k]) / best if best else 0.0


def search_metrics(found: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> dict[str, float]:
    """Compute search metrics in percent, from the items `found` for each query, best first, and
    those that are `right`.

    R@k is the share of queries with a right item among the first k, mean_recall the mean of R@1,
    R@5 and R@10 (as in MUGE), and nDCG@5 is as in KDD Cup 2020.
    """
    hits = [np.isin(items, of_query) for items, of_query in zip(found, right, strict=True)]
    values = {f"R@{k}": 100.0 * float(np.mean([hit[:k].any() for hit in hits])) for k in (1, 5, 10)}
    values["mean_recall"] = float(np.mean(list(values.values())))
    values["nDCG@5"] = 100.0 * float(
        np.mean([ndcg(hit, np.ones(len(of)), 5) for hit, of in zip(hits, right, strict=True)])
    )

    return values


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the area under the ROC curve: the share of (positive, negative) pairs in the right
    order, ties counting half; NaN unless both kinds occur.
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
    """Compute recommendation metrics in percent, from (scores, clicked) of each topic's showings.

    They are the AUC over all showings and, averaged over topics, the AUC (gAUC), nDCG@k and hit
    rate (HR@k). Topics with no clicks, or only clicks, count in the first alone.
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
