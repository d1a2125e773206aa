"""Write statements about pairs of generated scenes in the format of NLVR2."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_interbert.files import write_text
from megatron_interbert.sample.corpus import COLOUR_NAMES, World
from megatron_interbert.sample.tasks.draws import Purpose, draw_for
from megatron_interbert.sample.tasks.facts import named
from megatron_interbert.sample.tasks.scenes import TaskScene, draw_scene, write_scenes

SIDES = ("left", "right")


def statements_of(
    random: np.random.Generator, one: TaskScene, other: TaskScene
) -> Iterator[tuple[str, bool]]:
    """Yield statements about two scenes, and whether they are true of (one left, other right); of
    (other left, one right) each is the opposite.
    """
    for side, here, there in ((0, one, other), (1, other, one)):
        only = [thing for thing in here.things if thing not in there.things]
        thing = named(only[int(random.integers(len(only)))])
        asked = int(random.integers(2))
        yield f"the {SIDES[asked]} image contains a {thing}", asked == side

    uneven = [colour for colour in COLOUR_NAMES if one.count(colour) != other.count(colour)]
    for more in (True, False):  # in the first scene
        fitting = [c for c in uneven if (one.count(c) > other.count(c)) == more]
        if not fitting:
            return
        colour = str(random.choice(fitting))
        asked = int(random.integers(2))
        most, fewer = SIDES[asked], SIDES[1 - asked]
        text = f"the {most} image has more {colour} things than the {fewer} image"
        yield text, more == (asked == 0)


def write_nlvr2(world: World, folder: Path, split: str, sets: int, seed: int) -> None:
    """Write SPLIT.json, JSON lines about `sets` couples of scenes, each shown in both orders, and
    the stores SPLIT and SPLIT_boxes of their images.
    """
    lines = []
    shown: list[tuple[str, TaskScene]] = []

    for number in range(sets):
        random = draw_for(Purpose.NLVR2, seed, {"train": 0, "dev": 1}[split], number)
        one, other = draw_scene(world, random), draw_scene(world, random)
        statements = list(statements_of(random, one, other))

        for pair, (left, right) in enumerate(((one, other), (other, one))):
            name = f"{split}-{number}-{pair}"
            shown += [(f"{name}-img0", left), (f"{name}-img1", right)]
            lines += [
                {
                    "identifier": f"{name}-{place}",
                    "sentence": text,
                    "label": str(true == (pair == 0)),
                    "synset": one.place_name,
                    "query": f"{one.place_name}{number}",
                    "left_url": "",
                    "right_url": "",
                    "writer": "0",
                    "validation": {"0": str(true == (pair == 0))},
                }
                for place, (text, true) in enumerate(statements)
            ]

    folder.mkdir(parents=True, exist_ok=True)
    write_scenes(world, folder / split, seed, iter(shown))
    write_text(folder / f"{split}.json", "".join(json.dumps(line) + "\n" for line in lines))
