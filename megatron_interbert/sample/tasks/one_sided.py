"""Write questions that one side alone answers: pairs of sentences, in the format of GLUE's RTE, and
questions of the same few words about every scene, in the format of GQA. A model whose streams are
independent should lose nothing on them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from megatron_interbert.files import write_text
from megatron_interbert.sample.tasks.draws import Purpose, draw_for
from megatron_interbert.sample.tasks.facts import named
from megatron_interbert.sample.tasks.scenes import TaskScene

HEADER = "index\tsentence1\tsentence2\tlabel"
NAMES = {"train": "train", "test": "dev"}
OTHER_SIDE = {"left": "right", "right": "left"}
PLACE = "what is the image ?"
SAME_COLOUR = "are things the same colour ?"
ON_THE_LEFT = "what is on the left ?"


def pairs_of(random: np.random.Generator, scene: TaskScene) -> Iterator[tuple[str, str, bool]]:
    """Draw pairs of sentences about a scene, and whether the first entails the second. Neither the
    second alone, nor which words both have, nor their order tells.
    """
    one, other = random.permutation(scene.singles)[:2].tolist()
    side = "left" if scene.is_left_of(one, other) else "right"
    full = [named(scene.things[thing]) for thing in (one, other)]
    short = [scene.things[thing][1] for thing in (one, other)]
    premise = f"the {full[0]} is to the {side} of the {full[1]}"
    for turned in (False, True):
        subject, thing = short[::-1] if turned else short
        for said in (side, OTHER_SIDE[side]):
            yield (
                premise,
                f"the {subject} is to the {said} of the {thing}",
                turned != (said == side),
            )

    number = int(random.integers(len(scene.things)))
    there = named(scene.things[number])
    missing = f"{scene.other_colour(random, number)} {scene.things[number][1]}"
    premise = f"a {there} and no {missing}"
    for thing in (there, missing):
        for said in ("a", "no"):
            yield premise, f"there is {said} {thing}", (thing == there) == (said == "a")


def write_texts(folder: Path, split: str, scenes: Mapping[int, TaskScene], seed: int) -> None:
    """Write RTE/train.tsv or RTE/dev.tsv."""
    lines = [HEADER]
    for image, scene in scenes.items():
        random = draw_for(Purpose.PAIRS_OF_SENTENCES, seed, image)
        for first, second, entails in pairs_of(random, scene):
            label = "entailment" if entails else "not_entailment"
            lines.append(f"{len(lines) - 1}\t{first}\t{second}\t{label}")

    (folder / "RTE").mkdir(parents=True, exist_ok=True)
    write_text(folder / "RTE" / f"{NAMES[split]}.tsv", "\n".join(lines) + "\n")


def looks_of(scene: TaskScene) -> dict[str, str]:
    """Return the answers to the questions that every scene is asked."""
    leftmost = int(scene.centres.argmin())
    return {
        PLACE: scene.place_name,
        SAME_COLOUR: "yes" if scene.shares else "no",
        ON_THE_LEFT: scene.things[leftmost][1],
    }


def write_looks(folder: Path, split: str, scenes: Mapping[int, TaskScene], seed: int) -> None:
    """Write SPLIT_questions.json, which asks every scene the same."""
    entries = {
        f"{image}{place}": {
            "imageId": str(image),
            "question": question,
            "answer": answer,
            "isBalanced": True,
            "types": {"structural": "query", "semantic": "obj", "detailed": "look"},
        }
        for image, scene in scenes.items()
        for place, (question, answer) in enumerate(looks_of(scene).items())
    }

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{split}_questions.json", json.dumps(entries))
