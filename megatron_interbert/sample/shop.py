"""Writes the sample shop in Chinese: products with pictures and titles, queries, topics, and clicks
of users; all of it made up.

For each split (train, test): a region store of the products, whose captions are their titles (and
descriptions, for training); items.jsonl with their attributes; queries.jsonl in the form of MUGE
(query_id, query_text, item_ids); topics.jsonl (name, description, keywords); clicks.jsonl
(topic_id, item_id, user_id, clicked). The test products, which a service may show, have
pictures/ITEM_ID.png too. Products, queries and topics of the two splits are drawn apart. The same
seed gives the same shop.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_interbert.files import write_text
from megatron_interbert.progress import progress
from megatron_interbert.sample.detector import generated_store
from megatron_interbert.sample.shop_pictures import draw_product
from megatron_interbert.sample.shop_world import (
    KINDS,
    PLACES,
    Asker,
    Product,
    ShopWorld,
    topic,
    vocabulary,
)

# products that are shown for a topic in the clicks, up to half of them of kinds that it wants
SEEN = 60
USERS = 500
SPLITS = {"train": 1, "test": 2}


def write_split(
    world: ShopWorld,
    folder: Path,
    split: str,
    products: int,
    queries: int,
    topics: int,
    seed: int,
    pictures: bool,
) -> None:
    """Write one split: the store, then the pictures and the files that name its products."""

    def random(purpose: int, number: int = 0) -> np.random.Generator:
        return np.random.default_rng([seed, SPLITS[split], purpose, number])

    made: list[Product] = []
    drawn: dict[str, Image.Image] = {}

    with generated_store(
        folder / split, seed, [*KINDS, *PLACES], vocabulary(), "chinese"
    ) as writer:
        for number in progress(range(products), desc=f"{split} products", unit="product"):
            made.append(world.product(random(0, number), f"{split}-{number:06d}"))
            things, boxes = world.scene(random(1, number), made[-1])
            written = random(6, number)
            texts = [
                made[-1].title,
                *(
                    world.description(written, made[-1])
                    for _ in range(2 if split == "train" else 0)
                ),
            ]
            writer.add(
                world.detect(random(5, number), made[-1], things, boxes),
                [(text, "zh") for text in texts],
            )
            if pictures:
                drawn[made[-1].item_id] = draw_product(things, made[-1].place, boxes)

    for name, picture in drawn.items():
        (folder / split / "pictures").mkdir(exist_ok=True)
        picture.save(folder / split / "pictures" / f"{name}.png")

    write_lines(
        folder / split / "items.jsonl",
        (
            {
                "item_id": p.item_id,
                "title": p.title,
                "shop": p.shop,
                "price": p.price,
                **p.attributes(),
            }
            for p in made
        ),
    )
    asked = random(2)
    asker = Asker(made)
    write_lines(
        folder / split / "queries.jsonl",
        ({"query_id": f"{split}-q{number:05d}", **asker.query(asked)} for number in range(queries)),
    )
    wanted = random(3)
    clicks = random(4)
    found = {f"{split}-t{number:04d}": topic(wanted) for number in range(topics)}
    write_lines(
        folder / split / "topics.jsonl",
        (
            {
                "topic_id": key,
                "name": t.name,
                "description": t.description(),
                "keywords": t.keywords(),
            }
            for key, t in found.items()
        ),
    )

    def shown() -> Iterable[dict[str, Any]]:
        kinds = np.array([product.kind for product in made])
        for key, each in found.items():
            wanted_kind = np.isin(kinds, each.kinds)
            fit = clicks.permutation(np.flatnonzero(wanted_kind))[: SEEN // 2]
            other = clicks.permutation(np.flatnonzero(~wanted_kind))[: SEEN - len(fit)]
            for number in clicks.permutation(np.concatenate([fit, other])):
                product = made[number]
                clicked = (
                    clicks.random()
                    < 0.02 + 0.9 * each.appeal(product.kind, product.colour, product.place) ** 2
                )
                yield {
                    "topic_id": key,
                    "item_id": product.item_id,
                    "user_id": f"u{clicks.integers(USERS):03d}",
                    "clicked": int(clicked),
                }

    write_lines(folder / split / "clicks.jsonl", shown())


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSON object a line."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(path, text)
