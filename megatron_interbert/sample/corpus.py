"""Write the sample corpus: a generated world with captions in English and Chinese, for trying
things out.

Everything in it is made up: 60 kinds of objects in 6 colours are in 20 places, which determine
which objects occur together. Region features are noisy prototypes, boxes overlap like a detector's,
and soft labels confuse similar classes. The same seed gives the same corpus. Train and test scenes
are drawn independently.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_interbert.data.regions import Regions
from megatron_interbert.files import write_text
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from megatron_interbert.progress import progress
from megatron_interbert.sample.detector import FEATURES, SOFT_LABELS, Detector, generated_store
from megatron_interbert.sample.questions import question

PLACES = {
    "kitchen": "厨房",
    "street": "街道",
    "office": "办公室",
    "garden": "花园",
    "beach": "海滩",
    "bedroom": "卧室",
    "park": "公园",
    "farm": "农场",
    "school": "学校",
    "station": "车站",
    "market": "市场",
    "harbour": "港口",
    "forest": "森林",
    "library": "图书馆",
    "museum": "博物馆",
    "hospital": "医院",
    "garage": "车库",
    "theatre": "剧院",
    "bakery": "面包店",
    "hotel": "酒店",
}
COLOURS = {
    "red": "红色",
    "blue": "蓝色",
    "green": "绿色",
    "yellow": "黄色",
    "black": "黑色",
    "white": "白色",
}
OBJECTS = {
    "cup": "杯子",
    "plate": "盘子",
    "knife": "刀",
    "pan": "锅",
    "kettle": "水壶",
    "apple": "苹果",
    "bottle": "瓶子",
    "bowl": "碗",
    "spoon": "勺子",
    "oven": "烤箱",
    "car": "汽车",
    "bus": "公交车",
    "bicycle": "自行车",
    "sign": "路牌",
    "bench": "长椅",
    "truck": "卡车",
    "lamp": "灯",
    "dog": "狗",
    "door": "门",
    "motorcycle": "摩托车",
    "desk": "书桌",
    "chair": "椅子",
    "laptop": "电脑",
    "phone": "手机",
    "pen": "钢笔",
    "book": "书",
    "clock": "时钟",
    "printer": "打印机",
    "bag": "包",
    "screen": "屏幕",
    "tree": "树",
    "flower": "花",
    "bird": "鸟",
    "cat": "猫",
    "fence": "栅栏",
    "hose": "水管",
    "rake": "耙子",
    "pot": "花盆",
    "bush": "灌木",
    "swing": "秋千",
    "umbrella": "雨伞",
    "towel": "毛巾",
    "ball": "球",
    "boat": "船",
    "kite": "风筝",
    "hat": "帽子",
    "bucket": "桶",
    "surfboard": "冲浪板",
    "crab": "螃蟹",
    "shell": "贝壳",
    "bed": "床",
    "pillow": "枕头",
    "blanket": "毯子",
    "mirror": "镜子",
    "curtain": "窗帘",
    "dresser": "衣柜",
    "rug": "地毯",
    "doll": "娃娃",
    "vase": "花瓶",
    "picture": "画",
}
WORDS = [
    "a",
    "and",
    "in",
    "the",
    "is",
    "next",
    "to",
    "left",
    "right",
    "of",
    "there",
    "with",
    "scene",
    "on",
]
TASK_WORDS = [  # of the generated tasks (sample/tasks)
    *("no", "not", "yes", "are", "have", "has", "one", "two", "three", "thing", "things", "same"),
    *("different", "colour", "colours", "?", "how", "many", "what", "which", "it", "image"),
    *("images", "contains", "more", "than", "that"),
]
NAMES = list(OBJECTS)
COLOUR_NAMES = list(COLOURS)
PLACE_NAMES = list(PLACES)
WIDTH = 640
HEIGHT = 480


@dataclass
class Scene:
    """Hold a place, and kind, colour and box (x1 y1 x2 y2 in pixels) of each object in it."""

    place: int
    kinds: np.ndarray
    colours: np.ndarray
    boxes: np.ndarray


class World:
    """Hold the prototypes and rules of the world, which depend on the seed alone."""

    def __init__(self, seed: int, noise: float) -> None:
        random = np.random.default_rng([seed, 0])
        self.noise = noise
        self.object_features = random.normal(size=(len(NAMES), FEATURES))
        self.colour_features = random.normal(size=(len(COLOURS), FEATURES))
        self.sizes = random.uniform(60, 200, size=(len(NAMES), 2))
        # Up to eight objects are at home in each place, and each object in up to three places, so
        # the objects around a hidden one tell something about it, but not everything. Without
        # places they would tell nothing, and there would be nothing to learn.
        order = np.concatenate([random.permutation(len(NAMES)) for _ in range(3)])[
            : 8 * len(PLACES)
        ]
        self.homes = [np.unique(home) for home in order.reshape(len(PLACES), 8)]
        self.detector = Detector(self.object_features, noise)

    def draw(self, random: np.random.Generator) -> Scene:
        """Draw a scene: a place, and three to six of its objects with colours and boxes."""
        place = int(random.integers(len(PLACES)))
        count = int(random.integers(3, 7))
        kinds = random.permutation(self.homes[place])[:count]
        count = len(kinds)
        colours = random.integers(len(COLOURS), size=count)
        size = self.sizes[kinds] * random.uniform(0.7, 1.3, size=(count, 1))
        corner = random.uniform(0, 1, size=(count, 2)) * ([WIDTH, HEIGHT] - size)

        return Scene(place, kinds, colours, np.concatenate([corner, corner + size], axis=1))

    def scene(
        self, random: np.random.Generator, name: str
    ) -> tuple[Regions, list[tuple[str, str]]]:
        """Draw one image and its two captions [(text, language)], English and Chinese."""
        found = self.draw(random)
        features = self.object_features[found.kinds] + self.colour_features[found.colours]
        regions = self.detector.detect(
            random, name, (WIDTH, HEIGHT), found.kinds, features, found.boxes, found.colours
        )
        what = (found.place, found.kinds, found.colours, found.boxes)

        return regions, [(self.english(random, *what), "en"), (self.chinese(random, *what), "zh")]

    def annotated(self, scene: Scene, random: np.random.Generator, name: str) -> Regions:
        """Build the regions of a scene's objects as annotators would give them: one exact box for
        each object, in order; features are as noisy as the detector's.
        """
        features = self.object_features[scene.kinds] + self.colour_features[scene.colours]
        features = features + random.normal(scale=self.noise, size=features.shape)
        ids = self.detector.neighbours[scene.kinds] + 1
        probs = np.zeros((len(scene.kinds), SOFT_LABELS), np.float32)
        probs[:, 0] = 1.0

        return Regions(
            name,
            (WIDTH, HEIGHT),
            features.astype(np.float16),
            scene.boxes.astype(np.float32),
            ids,
            probs,
            scene.colours.astype(np.int32)[:, None],
            np.ones((len(scene.kinds), 1), np.float32),
        )

    def english(
        self,
        random: np.random.Generator,
        place: int,
        kinds: np.ndarray,
        colours: np.ndarray,
        boxes: np.ndarray,
    ) -> str:
        """Draw an English caption that names two or three of the objects."""
        picked = random.choice(len(kinds), size=int(random.integers(2, 4)), replace=False)
        things = [f"{COLOUR_NAMES[colours[i]]} {NAMES[kinds[i]]}" for i in picked]
        where = f" in the {PLACE_NAMES[place]}" if random.random() < 0.5 else ""
        if len(picked) > 2:
            return "a " + ", a ".join(things[:-1]) + f" and a {things[-1]}{where}"

        side = "left" if boxes[picked[0], 0] < boxes[picked[1], 0] else "right"

        return [
            f"a {things[0]} and a {things[1]}{where}",
            f"there is a {things[0]} next to a {things[1]}{where}",
            f"the {things[0]} is to the {side} of the {things[1]}{where}",
        ][int(random.integers(3))]

    def chinese(
        self,
        random: np.random.Generator,
        place: int,
        kinds: np.ndarray,
        colours: np.ndarray,
        boxes: np.ndarray,
    ) -> str:
        """Draw a caption of the same kind in Chinese."""
        picked = random.choice(len(kinds), size=int(random.integers(2, 4)), replace=False)
        things = [
            f"{COLOURS[COLOUR_NAMES[colours[i]]]}的{OBJECTS[NAMES[kinds[i]]]}" for i in picked
        ]
        where = f"{PLACES[PLACE_NAMES[place]]}里" if random.random() < 0.5 else ""
        if len(picked) > 2:
            return f"{where}有{'、'.join(things[:-1])}和{things[-1]}"

        side = "左" if boxes[picked[0], 0] < boxes[picked[1], 0] else "右"

        return [
            f"{where}有{things[0]}和{things[1]}",
            f"{where}{things[0]}在{things[1]}旁边",
            f"{where}{things[0]}在{things[1]}的{side}边",
        ][int(random.integers(3))]


def vocabulary() -> list[str]:
    """Return the vocabulary: special tokens, every word and character of the grammar, and letters
    and digits, with which any other word can be spelled.
    """
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    characters = sorted(
        set(
            "".join(
                [*PLACES.values(), *COLOURS.values(), *OBJECTS.values(), "的里有和在旁边左右、"]
            )
        )
    )
    words = [*WORDS, *PLACES, *COLOURS, *OBJECTS, ",", "."]

    return list(
        dict.fromkeys(
            [
                "[PAD]",
                "[UNK]",
                "[CLS]",
                "[SEP]",
                "[MASK]",
                *letters,
                *(f"##{c}" for c in letters),
                *words,
                *characters,
                *TASK_WORDS,
            ]
        )
    )


def open_store(folder: Path, seed: int) -> contextlib.AbstractContextManager[RegionStoreWriter]:
    """Open the writer of a store of scenes, whose regions have colours as attributes."""
    return generated_store(folder, seed, NAMES, vocabulary(), num_attributes=len(COLOUR_NAMES))


def write_split(world: World, folder: Path, split: str, scenes: int, seed: int) -> None:
    """Write one region store of generated scenes, with its vocabulary."""
    with open_store(folder / split, seed) as writer:
        for number in progress(range(scenes), desc=f"{split} scenes", unit="scene"):
            writer.add(*world.scene(_random(seed, split, number), f"{split}-{number:06d}"))


def write_questions(world: World, folder: Path, split: str, scenes: int, seed: int) -> None:
    """Write vcr/SPLIT.jsonl, a question about each scene in the format of VCR, and vcr/SPLIT, a
    store of the exact boxes that it refers to.
    """
    lines = []

    with open_store(folder / "vcr" / split, seed) as writer:
        for number in progress(range(scenes), desc=f"{split} questions", unit="scene"):
            name = f"{split}-{number:06d}"
            scene = world.draw(_random(seed, split, number))
            random = _random(seed, split, number, 1)
            writer.add(world.annotated(scene, random, name), [])
            kinds = [NAMES[i] for i in scene.kinds]
            colours = [COLOUR_NAMES[i] for i in scene.colours]
            lines.append(json.dumps(question(random, name, kinds, colours, COLOUR_NAMES)))

    write_text(folder / "vcr" / f"{split}.jsonl", "\n".join(lines) + "\n")


def _random(seed: int, split: str, number: int, *more: int) -> np.random.Generator:
    return np.random.default_rng([seed, {"train": 1, "test": 2}[split], number, *more])
