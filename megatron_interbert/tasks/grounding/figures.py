"""Judge chosen regions, and compute figures of whole evaluations."""

from collections.abc import Sequence

import numpy as np

from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.grounding.records import RegionRecord


def is_nearest(record: RegionRecord, boxes: np.ndarray, convention: str) -> np.ndarray:
    """Return which boxes [n, 4] overlap the right choice of a record more than its other choices,
    bool [n]; one that overlaps none is not right.
    """
    shared = overlaps(boxes, record.choices, convention)
    return (shared.argmax(axis=1) == record.facts) & (shared.max(axis=1) > 0)


def accuracy(rights: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the share of samples whose best region is right, in percent."""
    return {"accuracy": 100.0 * float(np.mean([right[0] for right in rights]))}


def accuracy_and_error(rights: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the shares of samples whose best region is right, and is wrong, in percent."""
    found = accuracy(rights)
    return {**found, "error": 100.0 - found["accuracy"]}


def recalls(firsts: Sequence[int], rights: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the shares of samples with a right one among their first k regions, in percent."""
    return {f"R@{k}": 100.0 * float(np.mean([right[:k].any() for right in rights])) for k in firsts}
