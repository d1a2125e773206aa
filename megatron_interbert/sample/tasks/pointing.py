"""Write what points at things of generated scenes: Visual7W, Flickr30k Entities, GuessWhat."""

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.files import write_bytes, write_text
from megatron_interbert.sample.corpus import COLOUR_NAMES, HEIGHT, NAMES, WIDTH
from megatron_interbert.sample.tasks.draws import Purpose, draw_for
from megatron_interbert.sample.tasks.facts import named
from megatron_interbert.sample.tasks.refcoco import corner_and_size
from megatron_interbert.sample.tasks.scenes import THINGS, TaskScene

CHOICES = 4
QUESTIONS = 3  # of Visual7W about a scene
SENTENCES = 2  # of Flickr30k Entities about a scene

Splits = Mapping[str, Mapping[int, TaskScene]]


def write_visual7w(folder: Path, scenes: Splits, seed: int) -> None:
    """Write dataset.json: questions which thing it is, each with four boxes."""
    images = []
    boxes = []

    for split, drawn in scenes.items():
        for image, scene in drawn.items():
            random = draw_for(Purpose.VISUAL7W, seed, image)
            asked = random.permutation(THINGS)[:QUESTIONS].tolist()
            pairs = [
                {
                    "qa_id": image * 10 + place,
                    "image_id": image,
                    "type": "which",
                    "question": f"which thing is the {scene.only(thing)} ?",
                    "answer": image * 10 + thing,
                    "multiple_choices": [
                        image * 10 + int(other)
                        for other in random.permutation(
                            [other for other in range(THINGS) if other != thing]
                        )[: CHOICES - 1]
                    ],
                }
                for place, thing in enumerate(asked)
            ]
            images.append({"image_id": image, "split": split, "qa_pairs": pairs})

            for thing in range(THINGS):
                x, y, width, height = corner_and_size(scene.boxes[thing])
                box = {"x": x, "y": y, "width": width, "height": height}
                name = NAMES[scene.kinds[thing]]
                number = image * 10 + thing
                boxes.append({"box_id": number, "image_id": image, "name": name, **box})

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "dataset.json", json.dumps({"images": images, "boxes": boxes}))


def write_entities(folder: Path, scenes: Splits, seed: int) -> None:
    """Write Sentences/, Annotations/ and a list of images for each split."""
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)

    for split, drawn in scenes.items():
        for image, scene in drawn.items():
            random = draw_for(Purpose.ENTITIES, seed, image)
            sentences = [sentence_of(random, image, scene) for _ in range(SENTENCES)]
            write_text(folder / "Sentences" / f"{image}.txt", "\n".join(sentences) + "\n")
            write_text(folder / "Annotations" / f"{image}.xml", annotation_of(image, scene))

        write_text(folder / f"{split}.txt", "".join(f"{image}\n" for image in drawn))


def sentence_of(random: np.random.Generator, image: int, scene: TaskScene) -> str:
    """Draw a sentence with two phrases for things, and one for the place."""
    one, other = random.permutation(THINGS)[:2].tolist()
    side = "left" if scene.is_left_of(one, other) else "right"
    first, second = (
        f"[/EN#{image * 10 + thing + 1}/other the {named(scene.things[thing])}]"
        for thing in (one, other)
    )
    place = f"[/EN#{image * 10 + THINGS + 1}/scene the {scene.place_name}]"

    return f"{first} is to the {side} of {second} in {place}"


def annotation_of(image: int, scene: TaskScene) -> str:
    """Return the XML of a scene's boxes, which count pixels from 1."""
    objects = []
    for thing in range(THINGS):
        corners = (round(float(value)) + 1 for value in scene.boxes[thing])
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        name = f"<name>{image * 10 + thing + 1}</name>"
        objects.append(f"<object>{name}<bndbox>{box}</bndbox></object>")

    name = f"<name>{image * 10 + THINGS + 1}</name>"
    objects.append(f"<object>{name}<scene>1</scene><nobndbox>0</nobndbox></object>")
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"

    return f"<annotation><filename>{image}.jpg</filename>{size}{''.join(objects)}</annotation>\n"


def write_guesswhat(folder: Path, scenes: Splits, seed: int) -> None:
    """Write guesswhat.SPLIT.jsonl.gz: a dialogue about one thing of each scene, by its colour and
    its side of the picture.

    The best guess by colours finds 74.8 % of 2,000 targets; by colours and sides, 87.2 %.
    """
    folder.mkdir(parents=True, exist_ok=True)

    for split, drawn in scenes.items():
        lines = []
        for image, scene in drawn.items():
            random = draw_for(Purpose.GUESSWHAT, seed, image)
            target = int(random.integers(THINGS))
            turns = [
                {"id": image * 10 + place, "q": question, "a": answer}
                for place, (question, answer) in enumerate(turns_of(random, scene, target))
            ]
            picture = {"file_name": f"{image}.jpg", "width": WIDTH, "height": HEIGHT}
            game = {
                "dialogue_id": image,
                "object_id": image * 10 + target,
                "picture": picture,
                "objects": objects_of(image, scene),
                "qas": turns,
                "status": "success",
            }
            lines.append(json.dumps(game) + "\n")

        content = gzip.compress("".join(lines).encode(), mtime=0)
        write_bytes(folder / f"guesswhat.{split}.jsonl.gz", content)


def objects_of(image: int, scene: TaskScene) -> list[dict[str, Any]]:
    """Return the objects of a game."""
    return [
        {
            "id": image * 10 + thing,
            "bbox": corner_and_size(scene.boxes[thing]),
            "category": NAMES[scene.kinds[thing]],
            "category_id": int(scene.kinds[thing]) + 1,
        }
        for thing in range(THINGS)
    ]


def turns_of(
    random: np.random.Generator, scene: TaskScene, target: int
) -> Iterator[tuple[str, str]]:
    """Yield questions about a thing with their answers, yes and no equally often for each form: two
    colours, of which one is right, and the side of the picture. None is about its kind, which the
    oracle is told; none names another thing, which could then be ruled out.
    """
    colour, _ = scene.things[target]
    wrong = str(random.choice([found for found in COLOUR_NAMES if found != colour]))
    for asked in random.permutation([colour, wrong]).tolist():
        yield f"is it {asked} ?", "Yes" if asked == colour else "No"

    is_left = bool(scene.centres[target] < WIDTH / 2)
    side = "left" if random.random() < 0.5 else "right"
    yield f"is it on the {side} ?", "Yes" if is_left == (side == "left") else "No"
