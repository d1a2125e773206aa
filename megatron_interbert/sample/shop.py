"""Write the sample shop in Chinese: products with pictures and titles, queries, topics, and clicks
of users, all made up.

For each split (train, test): a region store of the products, whose captions are their titles (and
descriptions, for training); items.jsonl with their attributes; queries.jsonl in the format of MUGE
(query_id, query_text, item_ids); topics.jsonl (name, description, keywords); clicks.jsonl
(topic_id, item_id, user_id, clicked). With `pictures`, also pictures/ITEM_ID.png of each product.
Products, queries and topics of the two splits are drawn independently. The same seed gives the same
shop.
"""

import json
from collections.abc import Iterable, Iterator
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
    Topic,
    topic,
    vocabulary,
)

# products that clicks.jsonl shows under a topic, up to half of them of the kinds that it wants
SEEN = 60
USERS = 500
SPLITS = {"train": 1, "test": 2}


class SplitWriter:
    """Write one split of the shop; each kind of thing is drawn from its own random generator."""

    def __init__(self, world: ShopWorld, folder: Path, split: str, seed: int) -> None:
        self.world = world
        self.folder = folder / split
        self.split = split
        self.seed = seed
        self.made: list[Product] = []

    def random(self, purpose: int, number: int = 0) -> np.random.Generator:
        """Return the random generator for one purpose and, if given, one thing."""
        return np.random.default_rng([self.seed, SPLITS[self.split], purpose, number])

    def write_products(self, products: int, pictures: bool) -> None:
        """Draw the products, and write their region store and, with `pictures`, their pictures."""
        drawn: dict[str, Image.Image] = {}
        names = [*KINDS, *PLACES]
        title = f"{self.split} products"
        with generated_store(self.folder, self.seed, names, vocabulary(), "chinese") as writer:
            for number in progress(range(products), desc=title, unit="product"):
                name = f"{self.split}-{number:06d}"
                product = self.world.product(self.random(0, number), name)
                self.made.append(product)
                things, boxes = self.world.scene(self.random(1, number), product)
                regions = self.world.detect(self.random(5, number), product, things, boxes)
                texts = [product.title, *self.descriptions(product, number)]
                writer.add(regions, [(text, "zh") for text in texts])
                if pictures:
                    drawn[product.item_id] = draw_product(things, product.place, boxes)

        for name, picture in drawn.items():
            (self.folder / "pictures").mkdir(exist_ok=True)
            picture.save(self.folder / "pictures" / f"{name}.png")

    def descriptions(self, product: Product, number: int) -> list[str]:
        """Draw two descriptions of a product for training, none for testing."""
        written = self.random(6, number)
        count = 2 if self.split == "train" else 0
        return [self.world.description(written, product) for _ in range(count)]

    def write_items(self) -> None:
        """Write items.jsonl, the products with their attributes."""
        write_lines(self.folder / "items.jsonl", map(item_record, self.made))

    def write_queries(self, queries: int) -> None:
        """Write queries.jsonl, in the format of MUGE."""
        asked = self.random(2)
        asker = Asker(self.made)
        write_lines(
            self.folder / "queries.jsonl",
            (
                {"query_id": f"{self.split}-q{number:05d}", **asker.query(asked)}
                for number in range(queries)
            ),
        )

    def write_topics(self, topics: int) -> None:
        """Write topics.jsonl, and clicks.jsonl with who clicked on what under them."""
        wanted = self.random(3)
        found = {f"{self.split}-t{number:04d}": topic(wanted) for number in range(topics)}
        lines = (topic_record(name, each) for name, each in found.items())
        write_lines(self.folder / "topics.jsonl", lines)
        write_lines(self.folder / "clicks.jsonl", self.clicks(found))

    def clicks(self, topics: dict[str, Topic]) -> Iterator[dict[str, Any]]:
        """Draw the products shown under each topic, up to half of them of its kinds, and whether
        each is clicked; yield the lines of clicks.jsonl.
        """
        random = self.random(4)
        kinds = np.array([product.kind for product in self.made])
        for name, each in topics.items():
            wanted = np.isin(kinds, each.kinds)
            fit = random.permutation(np.flatnonzero(wanted))[: SEEN // 2]
            other = random.permutation(np.flatnonzero(~wanted))[: SEEN - len(fit)]
            for number in random.permutation(np.concatenate([fit, other])):
                product = self.made[number]
                appeal = each.appeal(product.kind, product.colour, product.place)
                clicked = random.random() < 0.02 + 0.9 * appeal**2
                yield {
                    "topic_id": name,
                    "item_id": product.item_id,
                    "user_id": f"u{random.integers(USERS):03d}",
                    "clicked": int(clicked),
                }


def item_record(product: Product) -> dict[str, Any]:
    """Return a line of items.jsonl."""
    about = {name: getattr(product, name) for name in ("item_id", "title", "shop", "price")}
    return {**about, **product.attributes()}


def topic_record(name: str, topic: Topic) -> dict[str, Any]:
    """Return a line of topics.jsonl."""
    return {
        "topic_id": name,
        "name": topic.name,
        "description": topic.description(),
        "keywords": topic.keywords(),
    }


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
    """Write one split: the store, then the pictures and the files that refer to its products."""
    writer = SplitWriter(world, folder, split, seed)
    writer.write_products(products, pictures)
    writer.write_items()
    writer.write_queries(queries)
    writer.write_topics(topics)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(path, text)
