"""Draw numbers for each purpose of the generated tasks, so that no two purposes share theirs."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Name what numbers are drawn for; a number is never used again for another purpose."""

    STORE = 20
    VQA = 21
    GQA = 22
    VGQA = 23
    SNLI_VE = 24
    NLVR2 = 25
    SCENE = 26
    PAIRS_OF_SENTENCES = 27
    VISUAL7W = 28
    ENTITIES = 29
    GUESSWHAT = 30
    REFCOCO = 31


def draw_for(purpose: Purpose, seed: int, *place: int) -> np.random.Generator:
    """Return the generator of a purpose for a place, such as the number of an image."""
    return np.random.default_rng([seed, int(purpose), *place])
