"""Draw the scenes that generated tasks are about, and write their region stores."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from megatron_interbert.data.regions import Regions
from megatron_interbert.sample.corpus import (
    COLOUR_NAMES,
    HEIGHT,
    NAMES,
    PLACE_NAMES,
    WIDTH,
    Scene,
    World,
    open_store,
)
from megatron_interbert.sample.tasks.draws import Purpose, draw_for

THINGS = 6  # in every scene
SHARED = (3, 2, 1)  # things of each colour in a scene where colours are shared
SIZE = (0.4, 0.7)  # of things, against the size of their kind
SPREAD = 0.2  # of their places, in columns and rows

Thing = tuple[str, str]  # colour and kind


@dataclass
class TaskScene(Scene):
    """Hold a scene of six things of five kinds, two of one kind in different colours.

    Either each thing has a colour of its own, or (`shares`) three, two and one thing have the same
    one. No two things have the same column or row of the picture.
    """

    shares: bool

    @property
    def things(self) -> list[Thing]:
        """List the colour and kind of each thing; no two are alike."""
        return [
            (COLOUR_NAMES[colour], NAMES[kind])
            for kind, colour in zip(self.kinds, self.colours, strict=True)
        ]

    @property
    def place_name(self) -> str:
        """Return the name of the place."""
        return PLACE_NAMES[self.place]

    @property
    def twins(self) -> tuple[int, int]:
        """Return the two things of one kind, the left one first."""
        return next(
            tuple(sorted(pair, key=lambda thing: self.boxes[thing, 0]))
            for pair in combinations(range(THINGS), 2)
            if self.kinds[pair[0]] == self.kinds[pair[1]]
        )

    @property
    def singles(self) -> list[int]:
        """List the things that are the only ones of their kind."""
        return [thing for thing in range(THINGS) if thing not in self.twins]

    def only(self, thing: int) -> str:
        """Return words without a colour that mean this thing alone: `cup`, of twins `left cup`."""
        kind = self.things[thing][1]
        if thing in self.singles:
            return kind
        return f"{'left' if thing == self.twins[0] else 'right'} {kind}"

    def count(self, colour: str) -> int:
        """Count the things of a colour."""
        return sum(found == colour for found, _ in self.things)

    def is_left_of(self, one: int, other: int) -> bool:
        """Check whether a thing is to the left of another."""
        return self.centres[one] < self.centres[other]

    @property
    def centres(self) -> np.ndarray:
        """Return the horizontal place of each thing [6], in pixels."""
        return (self.boxes[:, 0] + self.boxes[:, 2]) / 2

    def other_colour(self, random: np.random.Generator, thing: int) -> str:
        """Draw a colour that no thing of this thing's kind has."""
        kind = self.things[thing][1]
        had = {colour for colour, name in self.things if name == kind}
        return str(random.choice([colour for colour in COLOUR_NAMES if colour not in had]))


def draw_scene(world: World, random: np.random.Generator) -> TaskScene:
    """Draw a scene."""
    rich = [place for place, home in enumerate(world.homes) if len(home) >= THINGS - 1]
    place = int(random.choice(rich))
    chosen = random.permutation(world.homes[place])[: THINGS - 1]
    kinds = np.array([chosen[0], *chosen])
    shares = bool(random.random() < 0.5)
    colours = draw_colours(random, shares)
    boxes = draw_boxes(world, random, kinds)
    order = random.permutation(THINGS)

    return TaskScene(place, kinds[order], colours[order], boxes[order], shares)


def draw_colours(random: np.random.Generator, shares: bool) -> np.ndarray:
    """Draw the colours of six things, of which the first two differ."""
    while True:
        each = random.permutation(len(COLOUR_NAMES))
        colours = random.permutation(np.repeat(each[: len(SHARED)], SHARED) if shares else each)
        if colours[0] != colours[1]:
            return colours


def draw_boxes(world: World, random: np.random.Generator, kinds: np.ndarray) -> np.ndarray:
    """Draw a box for each thing, in a column and a row of its own: [6, 4] in pixels."""
    count = len(kinds)
    half = world.sizes[kinds] * random.uniform(*SIZE, size=(count, 1)) / 2
    bound = np.array([WIDTH, HEIGHT])
    places = np.stack([random.permutation(count), random.permutation(count)], axis=1) + 0.5
    places += random.uniform(-SPREAD, SPREAD, size=(count, 2))
    centres = np.clip(places / count * bound, half, bound - half)

    return np.concatenate([centres - half, centres + half], axis=1)


def captions_of(random: np.random.Generator, scene: TaskScene) -> list[tuple[str, str]]:
    """Draw two captions of a scene, in English: what things there are and how they lie, how many
    have a colour, what is missing, whether two have the same colour.
    """
    one, other, third = random.permutation(THINGS)[:3].tolist()
    first, second, last = (" ".join(scene.things[thing]) for thing in (one, other, third))
    side = "left" if scene.is_left_of(one, other) else "right"
    colour = str(random.choice([colour for colour, _ in scene.things]))
    count = ("one", "two", "three")[scene.count(colour) - 1]
    same = "the same colour" if scene.colours[one] == scene.colours[other] else "different colours"
    said = [
        f"a {first} and a {second} in the {scene.place_name}",
        f"a {first} , a {second} and a {last}",
        f"the {first} is to the {side} of the {second}",
        f"the {first} is to the {side} of the {second} and there is a {last}",
        f"there is a {first} and no {scene.other_colour(random, other)} {scene.things[other][1]}",
        f"there {'is' if count == 'one' else 'are'} {count} {colour} thing{'s' * (count != 'one')}",
        f"the {first} and the {second} have {same}",
    ]

    return [(said[number], "en") for number in random.permutation(len(said))[:2]]


def write_scenes(
    world: World, folder: Path, seed: int, scenes: Iterator[tuple[str, TaskScene]]
) -> None:
    """Write two stores of scenes, given with their names: FOLDER, the regions of a detector with
    captions, and FOLDER_boxes, exact regions of the six things in their order.
    """
    with (
        open_store(folder, seed) as found,
        open_store(folder.with_name(f"{folder.name}_boxes"), seed) as exact,
    ):
        for name, scene in scenes:
            random = draw_for(Purpose.STORE, seed, zlib.crc32(name.encode()))
            found.add(detected(world, random, name, scene), captions_of(random, scene))
            exact.add(world.annotated(scene, random, name), [])


def detected(world: World, random: np.random.Generator, name: str, scene: TaskScene) -> Regions:
    """Draw the regions that a detector finds in a scene."""
    features = world.object_features[scene.kinds] + world.colour_features[scene.colours]
    return world.detector.detect(
        random,
        name,
        (WIDTH, HEIGHT),
        scene.kinds,
        features,
        scene.boxes,
        scene.colours,
    )
