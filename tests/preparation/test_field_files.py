"""Test small files in the shape in which people have them, each with the captions and images that
it must give; for features alone see test_feature_formats.py.
"""

from collections import defaultdict

import pytest

from tests.shared import SHARED, needs_shared
from tests.tools.building import build

FIELD = SHARED / "data" / "field"


def captions_of(store):
    """Return the captions of each image by its id, without those of a store that has none."""
    found = defaultdict(list)
    for number, image in enumerate(store.caption_image):
        found[store.image_id(int(image))].append(store.caption(number))

    return dict(found)


FOUR = ["a red bowl on a table", "a giraffe by a tree", "flowers in a vase", "a zebra in the grass"]
TRAIN = [f"COCO_train2014_{number:012d}" for number in (9, 25, 30, 34)]
ONE_EACH = {name: [text] for name, text in zip(TRAIN, FOUR, strict=True)}
BY_LINE = {str(number): [text] for number, text in enumerate(FOUR)}
# folder: (features, flags, captions by image)
KINDS = {
    "plain": ("f.tsv", ["--captions", "c.json"], ONE_EACH),
    "folders": (
        "folders.tsv",
        ["--captions", "folders.jsonl"],
        {
            "1001/main.jpg": ["red dress"],
            "1002/main.jpg": ["wooden table"],
            "1003/main.jpg": ["white cup"],
        },
    ),
    "cc12m": ("f.tsv", ["--captions", "cc12m.tsv"], BY_LINE),
    "cc12m as conceptual": (
        "f.tsv",
        ["--captions", "cc12m.tsv", "--captions-format", "conceptual"],
        BY_LINE,
    ),
    "json_array": ("f.tsv", ["--captions", "coco_karpathy_train.json"], ONE_EACH),
    "json_array with lists": (
        "f.tsv",
        ["--captions", "coco_karpathy_val.json"],
        {name: [text, f"{text} again"] for name, (text,) in ONE_EACH.items()},
    ),
    "lxmert_captions": (
        "train2014_obj36.tsv",
        ["--captions", "mscoco_train.json"],
        {name: [text, f"{text} seen"] for name, (text,) in ONE_EACH.items()},
    ),
    "csv_captions": (
        "f.tsv",
        ["--captions", "captions.txt"],
        {
            "1000268201_693b08cb0e": ["a red bowl on a table ."],
            "1001773457_577c3a7d70": ["a giraffe by a tree, in daylight ."],
            "1002674143_1b742ab4b8": ["flowers in a vase ."],
            "1003163366_44323f5815": ["a zebra in the grass, in daylight ."],
        },
    ),
    "muge_texts": (
        "products.tsv",
        ["--captions", "train_texts.jsonl"],
        {
            "1000000": ["红色条纹连衣裙"],
            "1000001": ["高级感托特包斜挎"],
            "1000002": ["高级感托特包斜挎"],
            "1000003": ["复古木质茶几"],
        },
    ),
    "muge_texts in the original form": (
        "products.tsv",
        ["--captions", "muge_queries.jsonl"],
        {
            "1000000": ["红色条纹连衣裙"],
            "1000001": ["高级感托特包斜挎"],
            "1000002": ["高级感托特包斜挎"],
            "1000003": ["复古木质茶几"],
        },
    ),
    "bom": ("f.tsv", ["--captions", "bom.jsonl"], ONE_EACH),
    "bom in COCO's form": ("f.tsv", ["--captions", "bom_coco.json"], ONE_EACH),
}


@needs_shared
@pytest.mark.parametrize("kind", KINDS)
def test_each_file_gives_its_captions_to_the_images_that_it_names(tmp_path, kind):
    features, flags, expected = KINDS[kind]
    folder = FIELD / kind.split(" ")[0]
    flags = [folder / flag if "." in flag else flag for flag in flags]
    store, out = build(tmp_path / "store", folder / features, *flags)
    assert captions_of(store) == expected
    assert store.num_images == len(expected)
    assert "left out" not in out


@needs_shared
@pytest.mark.parametrize("first", ["train2014_obj36.tsv", "vg_gqa_obj36.tsv"])
def test_equal_numbers_of_two_data_sets_are_different_images(tmp_path, first):
    folder = FIELD / "coco_and_vg"
    files = ["train2014_obj36.tsv", "vg_gqa_obj36.tsv"]
    sources = sorted((folder / name for name in files), key=lambda path: path.name != first)
    captions = folder / "captions_train2014.json", folder / "vg_phrases.jsonl"
    store, _ = build(tmp_path / "store", *sources, "--captions", *captions)
    assert store.num_images == 7
    assert captions_of(store) == {
        **{name: [f"COCO: {text}"] for name, (text,) in ONE_EACH.items()},
        "9": ["VG: a parked blue car"],
        "30": ["VG: tall brick building"],
        "2407890": ["VG: man with a hat"],
    }


@needs_shared
def test_stores_whose_images_have_the_same_numbers_are_joined_whole(tmp_path):
    folder = FIELD / "same_numbers"
    build(tmp_path / "cc", folder / "cc.tsv", "--captions", folder / "Train_GCC-training.tsv")
    build(tmp_path / "sbu", folder / "sbu.tsv", "--captions", folder / "sbu-captions-all.json")
    store, out = build(tmp_path / "both", tmp_path / "cc", tmp_path / "sbu")
    assert captions_of(store) == {
        **{f"cc/{number}": texts for number, texts in BY_LINE.items()},
        **{f"sbu/{number}": [f"my cat {text}"] for number, (text,) in BY_LINE.items()},
    }
    assert "8 images share an id with an image of another source" in out
