"""Draw what can be said of a scene: couples of statements with the same words in the same places,
one true and one false.
"""

from collections.abc import Iterator

import numpy as np

from megatron_interbert.sample.corpus import COLOUR_NAMES
from megatron_interbert.sample.tasks.scenes import THINGS, TaskScene

Couple = tuple[str, str]  # what is true, and what is false
Relation = tuple[str, str]  # `the red cup`, `to the left of the blue car`


def named(thing: tuple[str, str]) -> str:
    """Return a thing in words, such as `red cup`."""
    return " ".join(thing)


def existence(random: np.random.Generator, scene: TaskScene) -> Couple:
    """Draw a thing, and one of its kind in a colour that is not there."""
    thing = int(random.integers(THINGS))
    kind = scene.things[thing][1]
    return named(scene.things[thing]), f"{scene.other_colour(random, thing)} {kind}"


def relation(random: np.random.Generator, scene: TaskScene) -> tuple[Relation, Relation]:
    """Draw how two things lie, and the reverse."""
    one, other = random.permutation(THINGS)[:2].tolist()
    first, second = named(scene.things[one]), named(scene.things[other])
    is_left = scene.is_left_of(one, other)
    side = "left" if random.random() < 0.5 else "right"
    forth = f"the {first}", f"to the {side} of the {second}"
    back = f"the {second}", f"to the {side} of the {first}"

    return (forth, back) if is_left == (side == "left") else (back, forth)


def same_colour(random: np.random.Generator, scene: TaskScene) -> Couple | None:
    """Draw two single things of one colour, and two of different colours; None if there are no such
    couples.
    """
    pairs: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for one in scene.singles:
        for other in scene.singles:
            if one != other:
                pairs[bool(scene.colours[one] == scene.colours[other])].append((one, other))

    if not pairs[True] or not pairs[False]:
        return None

    chosen = [pairs[same][int(random.integers(len(pairs[same])))] for same in (True, False)]
    true, false = (
        f"the {scene.things[one][1]} and the {scene.things[other][1]}" for one, other in chosen
    )
    return true, false


def counts(random: np.random.Generator, scene: TaskScene) -> Iterator[tuple[str, int]]:
    """Yield four colours of a scene with shared ones: of three, two, one and no thing."""
    for wanted in range(4):
        fitting = [colour for colour in COLOUR_NAMES if scene.count(colour) == wanted]
        yield str(random.choice(fitting)), wanted
