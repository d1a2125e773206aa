"""Point at regions without the text: what a model must beat before its figures mean that it has
read both.
"""

import numpy as np

from megatron_interbert.data.packing import to_batch
from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.grounding.prediction import Ranked
from megatron_interbert.tasks.grounding.samples import RIGHT, RegionSamples
from megatron_interbert.tasks.placing import Records

RIDGE = 1.0
AT_ONCE = 256


def rank_by_image(
    trained: RegionSamples, records: Records, asked: RegionSamples, most: int
) -> list[Ranked]:
    """Return the best regions of samples from their images alone: by linear regression, over the
    regions of the training samples, of being right on features and places.
    """
    squares = wanted = 0.0
    for start in range(0, len(trained), AT_ONCE):
        rows = range(start, min(start + AT_ONCE, len(trained)))
        inputs, owner, boxes = looks_of(trained, rows)
        right = np.zeros(len(owner))
        for place, row in enumerate(rows):
            own = owner == place
            right[own] = overlaps(boxes[own], records.items[row].targets).max(axis=1) >= RIGHT

        squares = squares + inputs.T @ inputs
        wanted = wanted + inputs.T @ right

    weights = np.linalg.solve(squares + RIDGE * np.eye(len(squares)), wanted)
    ranked = []
    for start in range(0, len(asked), AT_ONCE):
        rows = range(start, min(start + AT_ONCE, len(asked)))
        inputs, owner, boxes = looks_of(asked, rows)
        scores = inputs @ weights
        for place in range(len(rows)):
            own = np.flatnonzero(owner == place)
            best = own[np.argsort(-scores[own], kind="stable")[:most]]
            ranked.append(Ranked(boxes[best], scores[best].astype(np.float32)))

    return ranked


def rank_by_chance(asked: RegionSamples, most: int, seed: int = 0) -> list[Ranked]:
    """Return regions of samples in a random order."""
    random = np.random.default_rng(seed)
    ranked = []

    for start in range(0, len(asked), AT_ONCE):
        rows = range(start, min(start + AT_ONCE, len(asked)))
        _, shown = asked.fields(rows)
        for place in range(len(rows)):
            boxes = shown.boxes[shown.owner == place]
            best = random.permutation(len(boxes))[:most]
            ranked.append(Ranked(boxes[best], np.zeros(len(best), np.float32)))

    return ranked


def looks_of(samples: RegionSamples, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for the regions that samples may choose, features and places with a constant, float64
    [C, F + 6]; the sample of each [C], and their boxes [C, 4].
    """
    fields, shown = samples.fields(rows)
    batch = to_batch(fields)
    features = batch.features.double().numpy()[shown.regions]
    places = batch.locations.double().numpy()[fields["candidates"]]
    constant = np.ones((len(places), 1))

    return np.concatenate([features, places, constant], axis=1), shown.owner, shown.boxes
