"""Write referring expressions about generated scenes in the format of RefCOCO."""

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.files import write_bytes, write_text
from megatron_interbert.sample.corpus import HEIGHT, WIDTH
from megatron_interbert.sample.tasks.draws import Purpose, draw_for
from megatron_interbert.sample.tasks.facts import named
from megatron_interbert.sample.tasks.scenes import THINGS, TaskScene

EACH = 3  # references in a scene


def expressions_of(random: np.random.Generator, scene: TaskScene, thing: int) -> Iterator[str]:
    """Yield expressions for a thing: by its kind, and its place if it is a twin; by another thing
    beside which it lies.
    """
    yield f"the {scene.only(thing)}"

    relations = list(telling_relations(scene, thing))
    if not relations:
        others = [other for other in range(THINGS) if other != thing]
        relations = [beside(scene, thing, other, scene.only(thing)) for other in others]

    yield relations[int(random.integers(len(relations)))]


def telling_relations(scene: TaskScene, thing: int) -> Iterator[str]:
    """Yield expressions that several things share but for the side on which they lie of another
    one: words alone do not tell which thing is meant.
    """
    colour, kind = scene.things[thing]

    for words, shared in ((kind, scene.kinds), (f"{colour} thing", scene.colours)):
        rivals = [rival for rival in range(THINGS) if shared[rival] == shared[thing]]
        rivals.remove(thing)

        for other in range(THINGS) if rivals else ():
            side = scene.is_left_of(thing, other)
            rest = [rival for rival in rivals if rival != other]
            if other != thing and all(scene.is_left_of(rival, other) != side for rival in rest):
                yield beside(scene, thing, other, words)


def beside(scene: TaskScene, thing: int, other: int, words: str) -> str:
    """Say on which side of another thing a thing lies that `words` mean."""
    side = "left" if scene.is_left_of(thing, other) else "right"
    return f"the {words} to the {side} of the {named(scene.things[other])}"


def write_refcoco(folder: Path, scenes: Mapping[str, Mapping[int, TaskScene]], seed: int) -> None:
    """Write refs(unc).p and instances.json of scenes, given by split and image number."""
    refs: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []

    for split, drawn in scenes.items():
        for image, scene in drawn.items():
            name = f"{image}.jpg"
            images.append({"id": image, "file_name": name, "width": WIDTH, "height": HEIGHT})
            boxes += [
                {
                    "id": image * 10 + thing,
                    "image_id": image,
                    "category_id": int(scene.kinds[thing]) + 1,
                    "bbox": corner_and_size(scene.boxes[thing]),
                }
                for thing in range(THINGS)
            ]
            refs += references_of(image, scene, split, seed)

    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "refs(unc).p", pickle.dumps(refs, protocol=2))
    write_text(folder / "instances.json", json.dumps({"images": images, "annotations": boxes}))


def references_of(image: int, scene: TaskScene, split: str, seed: int) -> list[dict[str, Any]]:
    """Draw the references in a scene."""
    random = draw_for(Purpose.REFCOCO, seed, image)
    refs = []

    for place, thing in enumerate(random.permutation(THINGS)[:EACH].tolist()):
        number = image * 10 + place
        sentences = [
            {"sent_id": number * 10 + count, "sent": text, "raw": text, "tokens": text.split()}
            for count, text in enumerate(expressions_of(random, scene, thing))
        ]
        refs.append(
            {
                "ref_id": number,
                "ann_id": image * 10 + thing,
                "category_id": int(scene.kinds[thing]) + 1,
                "image_id": image,
                "file_name": f"{image}_{place}.jpg",
                "split": split,
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
                "sentences": sentences,
            }
        )

    return refs


def corner_and_size(box: np.ndarray) -> list[float]:
    """Return a box as COCO's x, y, width, height."""
    left, top, right, bottom = (round(float(value), 2) for value in box)
    return [left, top, round(right - left, 2), round(bottom - top, 2)]
