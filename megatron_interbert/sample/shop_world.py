"""Define the generated shop of clothes and shoes: what its products, titles, queries and topics are
made of.

Everything is made up. Colour and pattern show in the picture, and are in about half of the titles;
material, brand and model are only in titles; the place shows only in the picture (and in the
descriptions). A topic wants four kinds, two colours and a place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_interbert.data.regions import Regions
from megatron_interbert.sample.detector import FEATURES, Detector

KINDS = (
    *(
        "连衣裙",
        "半身裙",
        "衬衫",
        "T恤",
        "毛衣",
        "风衣",
        "羽绒服",
        "牛仔裤",
        "短裤",
        "西装",
        "泳衣",
        "睡衣",
        "高跟鞋",
    ),
    *(
        "运动鞋",
        "凉鞋",
        "靴子",
        "拖鞋",
        "手提包",
        "双肩包",
        "草帽",
        "围巾",
        "手套",
        "太阳镜",
        "腰带",
    ),
)
COLOURS = ("红色", "蓝色", "绿色", "黄色", "黑色", "白色", "粉色", "紫色")
PATTERNS = ("纯色", "条纹", "波点", "格子", "碎花")
PLACES = ("海滩", "街道", "草地", "雪地", "室内", "舞台")
MATERIALS = ("纯棉", "真丝", "羊毛", "亚麻", "牛皮", "雪纺")
BRANDS = ("LUMI", "Nordo", "Aqua9", "Vela", "青禾", "木棉", "远山", "小满")
SEASONS = ("2026夏季", "2026秋冬", "春季新款", "四季")
PRAISE = ("韩版", "宽松", "修身", "百搭", "显瘦", "时尚", "复古", "简约", "女")
SHOPS = ("青禾旗舰店", "远山女装", "小满鞋包", "木棉之家", "LUMI官方店")
MOODS = ("清爽", "温暖", "约会", "通勤", "运动", "节日", "旅行", "校园")
GRAMMAR = "的在拍适合穿搭主题，系列·和、风-"
SIZE = (640, 640)
# share of titles that name each attribute
IN_TITLE = {"colour": 0.5, "pattern": 0.4, "material": 0.7, "brand": 0.8, "season": 0.6}
# attributes that a query may ask for, beside the kind
ASKED = (
    *(("colour",), ("pattern",), ("colour", "pattern"), ("brand",), ("material",)),
    *(("colour", "brand"), ("colour", "material")),
)
VISIBLE = ("colour", "pattern")


@dataclass
class Product:
    """Hold one article and its picture; integers are indexes into TABLES."""

    item_id: str
    kind: int
    colour: int
    pattern: int
    place: int
    material: int
    brand: int
    title: str
    shop: str
    price: float

    def attributes(self) -> dict[str, str]:
        """Return the attributes in words, by name."""
        return {name: table[getattr(self, name)] for name, table in TABLES.items()}


TABLES = {
    "kind": KINDS,
    "colour": COLOURS,
    "pattern": PATTERNS,
    "place": PLACES,
    "material": MATERIALS,
    "brand": BRANDS,
}


class ShopWorld:
    """Hold the prototypes and rules of the shop, which depend on the seed alone."""

    def __init__(self, seed: int, noise: float) -> None:
        random = np.random.default_rng([seed, 10])
        self.kinds, self.places, self.colours, self.patterns = (
            random.normal(size=(len(table), FEATURES))
            for table in (KINDS, PLACES, COLOURS, PATTERNS)
        )
        self.detector = Detector(np.concatenate([self.kinds, self.places]), noise)

    def product(self, random: np.random.Generator, item_id: str) -> Product:
        """Draw an article with its title."""
        drawn = {name: int(random.integers(len(table))) for name, table in TABLES.items()}
        named = {name for name, share in IN_TITLE.items() if random.random() < share}
        words = [
            BRANDS[drawn["brand"]] if "brand" in named else "",
            SEASONS[int(random.integers(len(SEASONS)))] if "season" in named else "",
            str(random.choice(PRAISE)),
            COLOURS[drawn["colour"]] if "colour" in named else "",
            PATTERNS[drawn["pattern"]] if "pattern" in named else "",
            MATERIALS[drawn["material"]] if "material" in named else "",
            KINDS[drawn["kind"]],
            (
                f" {chr(65 + int(random.integers(26)))}-{int(random.integers(100, 1000))}"
                if random.random() < 0.4
                else ""
            ),
        ]

        return Product(
            item_id,
            **drawn,
            title="".join(words),
            shop=str(random.choice(SHOPS)),
            price=int(random.integers(39, 900)) + 0.9,
        )

    @staticmethod
    def description(random: np.random.Generator, product: Product) -> str:
        """Draw a description of what can be seen of a product: its kind and most of colour, pattern
        and place.
        """
        said = {
            name: TABLES[name][getattr(product, name)] if random.random() < 0.8 else ""
            for name in ("colour", "pattern", "place")
        }
        looks = said["colour"] + said["pattern"]
        where = f"在{said['place']}拍的" if said["place"] else ""

        return f"{where}{looks}{'的' if looks else ''}{KINDS[product.kind]}"

    def scene(
        self, random: np.random.Generator, product: Product
    ) -> tuple[list[tuple[int, int, int]], np.ndarray]:
        """Draw what a picture shows: the article large in the middle, and sometimes another thing
        beside it.

        Returns (kind, colour, pattern) of each thing, and their boxes [n, 4] x1 y1 x2 y2 as shares
        of the picture.
        """
        things = [(product.kind, product.colour, product.pattern)]

        if random.random() < 0.3:
            things.append(
                tuple(int(random.integers(len(table))) for table in (KINDS, COLOURS, PATTERNS))
            )

        centre = random.uniform(0.4, 0.6, 2)
        extent = random.uniform(0.4, 0.7, 2)
        corner = random.uniform(0.0, 0.75, 2)

        return things, np.array(
            [[*(centre - extent / 2), *(centre + extent / 2)], [*corner, *(corner + 0.22)]][
                : len(things)
            ]
        )

    def detect(
        self,
        random: np.random.Generator,
        product: Product,
        things: list[tuple[int, int, int]],
        boxes: np.ndarray,
    ) -> Regions:
        """Draw the regions that a detector would find in a picture: its things, and their place."""
        kinds, colours, patterns = (list(numbers) for numbers in zip(*things, strict=True))
        features = self.kinds[kinds] + self.colours[colours] + self.patterns[patterns]
        everything = np.concatenate([boxes, [[0.02, 0.02, 0.98, 0.98]]]) * SIZE[0]
        classes = np.array([*kinds, len(KINDS) + product.place])

        return self.detector.detect(
            random,
            product.item_id,
            SIZE,
            classes,
            np.concatenate([features, self.places[[product.place]]]),
            everything,
        )


class Asker:
    """Make queries for some products."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = products
        self.numbers = {
            name: np.array([getattr(product, name) for product in products]) for name in TABLES
        }

    def query(self, random: np.random.Generator) -> dict[str, Any]:
        """Draw a query for one of the products by some of its attributes, with all products that it
        fits.

        `needs` is "title" if it asks for nothing visible, "picture" if no title of a fitting
        product names all the visible attributes that it asks for, else "either".
        """
        target = self.products[int(random.integers(len(self.products)))]
        asked = ASKED[int(random.integers(len(ASKED)))]
        words = [TABLES[name][getattr(target, name)] for name in asked]
        joined = "的" if random.random() < 0.3 else ""
        fits = np.all(
            [self.numbers[name] == getattr(target, name) for name in ("kind", *asked)], axis=0
        )
        fitting = [self.products[number] for number in np.flatnonzero(fits)]
        seen = [TABLES[name][getattr(target, name)] for name in asked if name in VISIBLE]
        told = any(all(word in product.title for word in seen) for product in fitting)
        needs = "title" if not seen else "either" if told else "picture"
        ids = [product.item_id for product in fitting]

        return {
            "query_text": "".join(words) + joined + KINDS[target.kind],
            "item_ids": ids,
            "needs": needs,
        }


@dataclass
class Topic:
    """Hold what a page of the shop is about: the kinds, colours and place that it wants."""

    name: str
    kinds: np.ndarray
    colours: np.ndarray
    place: int

    def description(self) -> str:
        """Describe the topic in a sentence."""
        return (
            f"在{PLACES[self.place]}拍的{'、'.join(COLOURS[c] for c in self.colours)}，"
            f"适合{'和'.join(KINDS[k] for k in self.kinds)}"
        )

    def keywords(self) -> list[str]:
        """List the words for its kinds, colours and place."""
        return [
            *(KINDS[k] for k in self.kinds),
            *(COLOURS[c] for c in self.colours),
            PLACES[self.place],
        ]

    def appeal(self, kind: int, colour: int, place: int) -> float:
        """Return how well a product fits, from 0 to 1."""
        return (
            0.4 * (kind in self.kinds)
            + 0.3 * (colour in self.colours)
            + 0.3 * (place == self.place)
        )


def topic(random: np.random.Generator) -> Topic:
    """Draw a topic."""
    place = int(random.integers(len(PLACES)))
    name = f"{random.choice(MOODS)}{PLACES[place]}系列"

    return Topic(
        name,
        random.choice(len(KINDS), 4, replace=False),
        random.choice(len(COLOURS), 2, replace=False),
        place,
    )


def vocabulary() -> list[str]:
    """Return the vocabulary: special tokens, letters and digits (also as word pieces), with which
    any other word can be spelled, and every character of the shop's texts.
    """
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    texts = [
        *KINDS,
        *COLOURS,
        *PATTERNS,
        *PLACES,
        *MATERIALS,
        *BRANDS,
        *SEASONS,
        *PRAISE,
        *SHOPS,
        *MOODS,
        GRAMMAR,
    ]
    characters = sorted({c for c in "".join(texts).lower() if c not in letters})

    return [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{c}" for c in letters),
        *characters,
    ]
