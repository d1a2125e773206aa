"""Write statements about generated scenes in the format of SNLI-VE: a picture entails them,
contradicts them, or does not tell.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_text
from megatron_interbert.sample.corpus import COLOUR_NAMES
from megatron_interbert.sample.tasks.draws import Purpose, draw_for
from megatron_interbert.sample.tasks.scenes import TaskScene, captions_of

ROUNDS = 2  # of an entailment, a contradiction and a neutral statement about each scene
MOST_TRIES = 1000  # of matching scenes


def write_snli_ve(folder: Path, split: str, scenes: Mapping[int, TaskScene], seed: int) -> None:
    """Write snli_ve_SPLIT.jsonl.

    `the cup is red` is entailed by a red cup and contradicted by a blue one; a picture without cups
    does not tell. Neutral statements take the kinds of other scenes, so that each kind occurs
    equally often under each label.
    """
    lines = []
    images = list(scenes)

    for number in range(ROUNDS):
        random = draw_for(Purpose.SNLI_VE, seed, number)
        drawn = {image: int(random.choice(scenes[image].singles)) for image in images}
        without = others_without(random, scenes, drawn)

        for image, thing in drawn.items():
            scene = scenes[image]
            colour, kind = scene.things[thing]
            wrong = scene.other_colour(random, thing)
            any_colour = str(random.choice(COLOUR_NAMES))
            for about, said, label in (
                (image, colour, "entailment"),
                (image, wrong, "contradiction"),
                (without[image], any_colour, "neutral"),
            ):
                premise = captions_of(random, scenes[about])[0][0]
                lines.append(
                    {
                        "Flickr30K_ID": str(about),
                        "pairID": f"{about}.jpg#{number}r{len(lines)}{label[0]}",
                        "gold_label": label,
                        "sentence1": premise,
                        "sentence2": f"the {kind} is {said}",
                    }
                )

    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_text(folder / f"snli_ve_{split}.jsonl", text)


def others_without(
    random: np.random.Generator, scenes: Mapping[int, TaskScene], drawn: Mapping[int, int]
) -> dict[int, int]:
    """Match each scene with another one that lacks the kind of its drawn thing: image -> image,
    each exactly once.

    Raises UsageError if there are too few scenes for that.
    """
    images = list(scenes)
    kinds = {image: int(scenes[image].kinds[drawn[image]]) for image in images}
    other = dict(zip(images, random.permutation(images).tolist(), strict=True))

    def clash(image: int, with_image: int) -> bool:
        return kinds[image] in scenes[with_image].kinds

    for _ in range(MOST_TRIES):
        clashing = [image for image in images if clash(image, other[image])]
        if not clashing:
            return other

        for one in clashing:
            two = int(random.choice(images))
            if not clash(one, other[two]) and not clash(two, other[one]):
                other[one], other[two] = other[two], other[one]

    raise UsageError(
        f"--tasks: {len(images)} scenes are too few for statements about things that other scenes"
        " lack; give --train-scenes and --test-scenes of 10 or more"
    )
