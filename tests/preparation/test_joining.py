"""Test that captions reach the images that they name and no others, and that nothing vanishes
uncounted: in small cases, and in random corpora whose ids clash.
"""

import itertools
import json
import os
import random
import re
import shutil
from collections import Counter

import pytest

from megatron_interbert.data.image_names import SAME, match_names
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.build import build
from megatron_interbert.preparation.building.captions.table import CaptionTable
from megatron_interbert.preparation.building.joining import Clashes, Images
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.fields import ReadOptions
from megatron_interbert.preparation.building.sources.opening import open_features
from tests.preparation.formats import lxmert_line, made_up_images, vilbert_lmdb, write_npz

OPTIONS = ReadOptions(trust_pickle=True)


def write_features(path, ids, kind="tsv"):
    """Write made-up images with some ids; each has another width, from 101, to be told by."""
    images = made_up_images(len(ids))
    for number, (image, name) in enumerate(zip(images, ids, strict=True)):
        image["image_id"] = name
        image["image_w"] = 101 + number

    if kind == "npz":
        return write_npz(path, images)
    if kind == "lmdb":
        return vilbert_lmdb(path, images)

    path.write_text("".join(map(lxmert_line, images)))

    return path


def write_captions(path, captions):
    """Write (image, caption) pairs as JSON Lines."""
    lines = [json.dumps({"image": image, "caption": text}) for image, text in captions]
    path.write_text("\n".join(lines) + "\n")

    return path


def make(folder, sources, captions=(), only=None, max_dropped=1.0, shard=3):
    """Build a store in this process; return (captions by image, manifest)."""
    output = folder / "store"
    plan = BuildPlan(
        [open_features(str(source), "auto", OPTIONS) for source in sources],
        str(output),
        [str(path) for path in captions],
        only=only,
        detector={"name": "x"},
        images_per_shard=shard,
    )
    manifest = build(plan, max_dropped=max_dropped)
    store = RegionStore(str(output))
    found = {store.image_id(number): [] for number in range(store.num_images)}
    for number, image in enumerate(store.caption_image):
        found[store.image_id(int(image))].append(store.caption(number))

    return found, manifest


def check(tmp_path, ids, captions, expected, left_out=None, **more):
    """Build one source (or several, if `ids` is a dictionary by name) with captions that are named
    after themselves, and compare captions by image and counts of captions left out.
    """
    sources = ids if isinstance(ids, dict) else {"a.tsv": ids}
    paths = [write_features(tmp_path / name, names) for name, names in sources.items()]
    files = [write_captions(tmp_path / "c.jsonl", [(name, f"by {name}") for name in captions])]
    found, manifest = make(tmp_path, paths, files, **more)
    assert found == expected
    assert manifest["captions_left_out"] == (left_out or {})

    return manifest


def test_a_loose_name_counts_where_it_means_one_image(tmp_path):
    check(
        tmp_path,
        ["a.jpg", "b/c.png", "007", "COCO_val2014_000000000042", "8"],
        ["x/a.png", "c", "7.jpg", "42", "COCO_train2014_000000000008.jpg"],
        {
            "a.jpg": ["by x/a.png"],
            "b/c.png": ["by c"],
            "007": ["by 7.jpg"],
        },
        # "42" and "8" would be one image if all were spelt one way; here plain numbers are others
        {"unclear which image their name means": 2},
    )


def test_a_loose_name_of_several_images_means_none(tmp_path):
    check(
        tmp_path,
        ["1/main.jpg", "2/main.jpg", "a.jpg", "a.png", "9", "009"],
        ["main.jpg", "1/main.jpg", "a", "a.png", "09", "9"],
        {"1/main.jpg": ["by 1/main.jpg"], "a.png": ["by a.png"], "9": ["by 9"]},
        {"unclear which image their name means": 3},
    )


def test_a_key_that_a_stricter_one_has_told_apart_is_of_no_use(tmp_path):
    """Check captions of several images whose names share a number, or the end of their path."""
    check(
        tmp_path,
        ["0", "7", "42", "a/LongName1.npz", "home/devon/1000092795.jpg"],
        [
            *("1001/0.jpg", "1002/0.jpg", "7.jpg", "7.png"),
            *("train2014/000000000042.jpg", "val2014/000000000042.jpg"),
            *("b/LongName1.jpg", "b/LongName1.png", "train/1000092795.jpg"),
        ],
        {"home/devon/1000092795.jpg": ["by train/1000092795.jpg"]},
        {"unclear which image their name means": 8},
    )


def test_accents_are_letters_however_a_system_writes_them(tmp_path):
    """Check names of files as macOS writes them (NFD) beside captions as others do (NFC)."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    check(
        tmp_path,
        [f"{decomposed}-1.jpg", f"{composed}-2.jpg", f"{composed}-3", f"{decomposed}-3"],
        [f"{composed}-1.jpg", f"x/{decomposed}-2", f"{composed}-3", f"{decomposed}-3.jpg"],
        {
            f"{decomposed}-1.jpg": [f"by {composed}-1.jpg"],
            f"{composed}-2.jpg": [f"by x/{decomposed}-2"],
            f"{composed}-3": [f"by {composed}-3"],
        },
        {"unclear which image their name means": 1},
    )


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def built_with(tmp_path, ids, records):
    """Build images of some ids with caption records; return (captions by image, left out)."""
    source = write_features(tmp_path / "f.tsv", ids)
    captions = write_records(tmp_path / "c.jsonl", records)
    found, manifest = make(tmp_path, [source], [captions])
    return found, manifest["captions_left_out"]


def test_names_of_one_kind_count_those_that_mean_most_images(tmp_path):
    """Check img2dataset's keys, of which one photo is missing, beside addresses that end in the
    name of another.
    """
    records = [
        {"key": f"00000000{n}", "url": f"http://a/p/00000000{6 - n}.jpg", "caption": f"text {n}"}
        for n in (1, 2, 3, 4)
    ]
    found, left_out = built_with(tmp_path, [f"00000000{n}" for n in (1, 2, 3, 5)], records)
    assert found == {f"00000000{n}": [f"text {n}"] for n in (1, 2, 3)}
    assert left_out == {"no image of that name": 1}


def test_numbers_of_a_data_set_whose_images_go_by_file_mean_no_others(tmp_path):
    """Check VizWiz beside Visual Genome, which has other pictures by its numbers."""
    vizwiz = [
        {"file_name": f"VizWiz_train_0000000{n}.jpg", "image_id": n, "caption": f"viz {n}"}
        for n in (1, 2, 3)
    ]
    genome = [{"image_id": 2, "caption": "vg 2"}]
    ids = ["VizWiz_train_00000001.jpg", "VizWiz_train_00000003.jpg", "1", "2", "3"]
    found, left_out = built_with(tmp_path, ids, [*vizwiz, *genome])
    assert found == {ids[0]: ["viz 1"], ids[1]: ["viz 3"], "2": ["vg 2"]}
    assert left_out == {"no image of that name": 1}


def test_addresses_that_name_images_count_more_than_lines(tmp_path):
    """Check the addresses of COCO's photos, whose lines are numbers of other photos."""
    urls = [f"http://images.cocodataset.org/train2017/00000000000{n}.jpg" for n in (3, 1, 2)]
    records = [{"URL": url, "TEXT": f"of {url[-5]}"} for url in urls]
    found, left_out = built_with(tmp_path, ["1", "2", "3"], records)
    assert found == {n: [f"of {n}"] for n in "123"}
    assert left_out == {}


def test_lines_count_where_addresses_name_few_images(tmp_path):
    urls = ["http://a/00000001.jpg", *(f"http://a/photo-of-{n}.jpg" for n in range(1, 4))]
    records = [{"url": url, "caption": f"line {n}"} for n, url in enumerate(urls)]
    found, left_out = built_with(tmp_path, ["0", "1", "2"], records)
    assert found == {str(n): [f"line {n}"] for n in range(3)}
    assert left_out == {"no image of that name": 1}


def test_lines_count_alike_beside_long_and_short_addresses(tmp_path):
    urls = ["http://a/1.jpg", "http://a/holiday-photo.jpg", "http://a/00000000.jpg", "http://a/b"]
    records = [{"url": url, "caption": f"line {n}"} for n, url in enumerate(urls)]
    found, left_out = built_with(tmp_path, ["0", "1", "2", "3"], records)
    assert found == {str(n): [f"line {n}"] for n in range(4)}
    assert left_out == {}


def test_two_captions_of_one_loose_name_are_not_of_one_image(tmp_path):
    check(
        tmp_path,
        ["1/main.jpg", "COCO_train2014_000000000009", "x"],
        ["1/main.jpg", "2/main.jpg", "9", "COCO_train2014_000000000009.jpg", "x.jpg", "x.png"],
        {
            "1/main.jpg": ["by 1/main.jpg"],
            "COCO_train2014_000000000009": ["by COCO_train2014_000000000009.jpg"],
        },
        {"unclear which image their name means": 4},
    )


def test_folders_and_endings_of_several_files_meet(tmp_path):
    check(
        tmp_path,
        ["COCO_train2014_000000000009", "d/e/f.jpg"],
        ["train2014/COCO_train2014_000000000009.jpg", "COCO_train2014_000000000009", "e/f"],
        {
            "COCO_train2014_000000000009": [
                "by train2014/COCO_train2014_000000000009.jpg",
                "by COCO_train2014_000000000009",
            ],
            "d/e/f.jpg": ["by e/f"],
        },
    )


def test_an_id_of_two_sources_is_no_name(tmp_path):
    """Check that captions that may belong to either image reach none, and that it is said."""
    manifest = check(
        tmp_path,
        {"a.tsv": ["1", "2"], "b.tsv": ["1", "3"]},
        ["1", "2", "3"],
        {"2": ["by 2"], "3": ["by 3"]},
        {"unclear which image their name means": 1},
    )
    assert manifest["dropped"] == {"its captions may belong to another image of that name": 2}


def test_an_id_twice_in_a_source_is_dropped_and_counted(tmp_path):
    manifest = check(tmp_path, ["1", "2", "1"], ["1", "2"], {"1": ["by 1"], "2": ["by 2"]})
    assert manifest["dropped"] == {"image id seen before in its source": 1}
    source = tmp_path / "a.tsv"
    (tmp_path / "again").mkdir()
    with pytest.raises(UsageError, match="seen before in its source; more than"):
        make(tmp_path / "again", [source], max_dropped=0.1)


def test_an_image_that_comes_again_as_it_was_is_no_fault(tmp_path):
    """Check rows of query and product, as in KDD Cup 2020, where a product has many rows."""
    image, other = made_up_images(2)
    lines = [lxmert_line(image), lxmert_line(other), lxmert_line(image), lxmert_line(image)]
    (tmp_path / "a.tsv").write_text("".join(lines))
    _, manifest = make(tmp_path, [tmp_path / "a.tsv"], max_dropped=0.0)
    assert manifest["dropped"] == {"the same image again": 2}
    assert manifest["counts"]["images"] == 2


def test_a_dropped_image_keeps_its_name(tmp_path):
    """Check that captions of an image that cannot be used go to no other one."""
    images = made_up_images(3)
    for image, name in zip(images, ("1/main.jpg", "2/main.jpg", "7"), strict=True):
        image["image_id"] = name
    images[0]["features"] = images[0]["features"] * float("nan")
    (tmp_path / "a.tsv").write_text("".join(map(lxmert_line, images)))
    files = [write_captions(tmp_path / "c", [("main.jpg", "x"), ("7", "y"), ("1/main.jpg", "z")])]
    found, manifest = make(tmp_path, [tmp_path / "a.tsv"], files)
    assert found == {"7": ["y"]}
    assert sum(manifest["dropped"].values()) == 2


def test_a_less_reliable_name_counts_only_if_the_better_ones_mean_no_image(tmp_path):
    lines = [
        {"image": "7.jpg", "image_id": 1, "caption": "of 7"},
        {"image": "none.jpg", "image_id": 2, "caption": "of 2"},
    ]
    captions = tmp_path / "c.jsonl"
    captions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = write_features(tmp_path / "a.tsv", ["7", "1", "2"])
    found, manifest = make(tmp_path, [source], [captions])
    assert found == {"7": ["of 7"]}
    assert manifest["captions_left_out"] == {"no image of that name": 1}
    lines[0]["image"] = "no.jpg"
    write_records(captions, lines)
    shutil.rmtree(tmp_path / "store")
    assert make(tmp_path, [source], [captions])[0] == {"1": ["of 7"], "2": ["of 2"]}


def test_numbers_of_coco_are_not_those_of_another_data_set(tmp_path):
    """Check captions of COCO images that are not in the build: their numbers name images of Visual
    Genome; and Karpathy's running numbers, which name nothing.
    """
    image = {"filename": "COCO_val2014_000000000025.jpg", "cocoid": 25, "imgid": 3}
    captions = tmp_path / "karpathy.json"
    captions.write_text(json.dumps({"images": [{**image, "sentences": [{"raw": "of COCO"}]}]}))
    extra = write_captions(tmp_path / "c", [("COCO_train2014_000000000009", "x"), ("8", "y")])
    vg = write_features(tmp_path / "vg.tsv", ["25", "3", "8"])
    coco = write_features(tmp_path / "coco.tsv", ["COCO_train2014_000000000009"])
    found, manifest = make(tmp_path, [vg, coco], [captions, extra])
    assert found == {"8": ["y"], "COCO_train2014_000000000009": ["x"]}
    assert sum(manifest["captions_left_out"].values()) == 1


def test_folders_of_other_splits_are_not_left_out(tmp_path):
    check(
        tmp_path,
        ["train/a000001.png", "images/abcdefg.jpg", "train/x.jpg", "1001/main.jpg"],
        ["val/a000001.png", "photos/abcdefg", "x", "1002/main.jpg"],
        {"images/abcdefg.jpg": ["by photos/abcdefg"], "train/x.jpg": ["by x"]},
        {"no image of that name": 2},
    )


def test_names_that_no_store_can_hold_do_no_harm(tmp_path):
    """Check a file whose name is not UTF-8, long ids of dropped images, and a source `.`."""
    folder = write_features(tmp_path / "npz", ["12", "13"], "npz")
    (folder / b"caf\xe9.npz".decode("utf-8", "surrogateescape")).write_bytes(b"PK")
    captions = write_captions(tmp_path / "c", [("12", "a"), ("13", "b")])
    before = os.getcwd()
    os.chdir(folder)
    try:
        found, manifest = make(tmp_path, ["."], [captions])
    finally:
        os.chdir(before)
    assert found == {"12": ["a"], "13": ["b"]}
    assert sum(manifest["dropped"].values()) == 1


def test_only_takes_what_it_means(tmp_path):
    source = write_features(tmp_path / "a.tsv", ["1/main.jpg", "2/main.jpg", "5.jpg", "6", "7"])
    found, manifest = make(tmp_path, [source], only=["main.jpg", "5", "006", "none"])
    assert list(found) == ["5.jpg", "6"]
    assert manifest["dropped"] == {
        "--only may mean another image of that name": 2,
        "not in --only": 1,
    }
    assert manifest["only_not_found"] == 2, "main.jpg and none mean no single image"
    lines = map(json.loads, (tmp_path / "store" / "dropped.jsonl").read_text().splitlines())
    names = [line["image_id"] for line in lines if line["reason"] == "ids of no image"]
    assert names == ["main.jpg", "none"]


def test_only_and_captions_that_name_exactly_leave_others_without_fault(tmp_path):
    """Check a store of COCO and Visual Genome: the numbers of one are not those of the other."""
    coco = write_features(tmp_path / "coco.tsv", ["COCO_train2014_000000000009", "x"])
    vg = write_features(tmp_path / "vg.tsv", ["9", "25"])
    found, manifest = make(tmp_path, [coco, vg], only=["9", "25"])
    assert list(found) == ["9", "25"]
    assert manifest["dropped"] == {"not in --only": 2}
    (tmp_path / "store").rename(tmp_path / "other")
    files = [write_captions(tmp_path / "c", [("9", "a car"), ("25", "a hat")])]
    found, manifest = make(tmp_path, [coco, vg], files)
    assert found == {"9": ["a car"], "25": ["a hat"]}
    assert manifest["dropped"] == {"no caption": 2}


def test_sources_of_one_name_are_told_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    sources = [
        write_features(tmp_path / "x" / "f.tsv", ["1", "x/f/1"]),
        write_features(tmp_path / "y" / "f.tsv", ["1", "2"]),
    ]
    found, manifest = make(tmp_path, sources)
    assert list(found) == ["x/f-2/1", "x/f/1", "y/f/1", "2"]
    assert manifest["renamed_images"] == 2


SPELLINGS = {
    "coco": [
        lambda n: f"COCO_train2014_{n:012d}",
        lambda n: f"COCO_train2014_{n:012d}.jpg",
        lambda n: f"train2014/COCO_train2014_{n:012d}.jpg",
    ],
    "vg": [lambda n: str(n), lambda n: f"{n}.jpg", lambda n: f"VG_100K/{n}.jpg"],
    "shop": [lambda n: f"{n}/main.jpg", lambda n: f"photos/{n}/main.jpg", lambda n: f"{n}/main"],
    "zeros": [lambda n: f"img{n:06d}", lambda n: f"img{n:06d}.png", lambda n: f"p/img{n:06d}.png"],
}


def loose(name):
    """Return what the strictest rules and the loosest have in common: no folder, ending, zeros."""
    stem = re.sub(r"\.(jpg|png)$", "", name).rsplit("/", 1)[-1]
    number = re.sub(r"^COCO_train2014_", "", stem)

    return number.lstrip("0") or "0" if number.isdigit() else stem


@pytest.mark.parametrize("seed", range(40))
def test_no_caption_reaches_an_image_that_it_does_not_name(tmp_path, seed):
    """Check random corpora of several data sets with equal numbers, through TSV, npz and LMDB, some
    images and some captions missing or twice: every caption that arrives is of the picture that it
    describes; each image and each caption is in the store or counted.
    """
    chance = random.Random(seed)
    sets = chance.sample(sorted(SPELLINGS), chance.randrange(1, 5))
    sources = []
    pairs = []
    total = 0

    for place, kind in enumerate(sets):
        spell = chance.choice(SPELLINGS[kind])
        numbers = chance.sample(range(1, 12), chance.randrange(1, 9))
        pictures = [*numbers, *chance.choices(numbers, k=chance.choice((0, 0, 2)))]
        form = (
            chance.choice(("tsv", "npz", "lmdb")) if len(set(pictures)) == len(pictures) else "tsv"
        )
        ids = [spell(n) for n in pictures]
        if form == "npz" and any("/" in name for name in ids):
            form = "tsv"
        sources.append(write_features(tmp_path / f"{kind}-{place}", ids, form))
        total += len(ids)
        spell = chance.choice(SPELLINGS[kind])
        for n in range(1, 12):
            if chance.random() < 0.7:
                pairs += [(spell(n), f"{kind} {n} {k}") for k in range(chance.randrange(1, 3))]

    chance.shuffle(pairs)
    cut = chance.randrange(len(pairs) + 1)
    files = [
        write_captions(tmp_path / f"c{number}.jsonl", part)
        for number, part in enumerate((pairs[:cut], pairs[cut:]))
        if part
    ]
    if not files:
        return

    try:
        found, manifest = make(tmp_path, sources, files, shard=chance.randrange(1, 5))
    except UsageError as error:
        problem = str(error)
    else:
        problem = ""
        check_corpus(found, manifest, pairs, total)

    assert re.search("none of the|cannot be used|^$", problem)


def check_corpus(found, manifest, pairs, total):
    """Check captions by image of a store from a random corpus of `total` images and some pairs."""
    named = dict(zip([text for _, text in pairs], [name for name, _ in pairs], strict=True))
    used = Counter(text for texts in found.values() for text in texts)
    assert set(used.values()) <= {1}, "a caption is of one image"
    assert sum(used.values()) + sum(manifest["captions_left_out"].values()) == len(pairs)
    assert len(found) + sum(manifest["dropped"].values()) == total == manifest["images_read"]

    for image, texts in found.items():
        for text in texts:
            kind, n, _ = text.split()
            assert loose(named[text]) == loose(image)
            assert image in {spell(int(n)) for spell in SPELLINGS[kind]}, (image, text)


@pytest.mark.parametrize("seed", range(10))
def test_joined_stores_keep_all_their_images_and_captions(tmp_path, seed):
    """Check stores whose images share ids: each image is in the joined store under its own name or
    one that begins with its store, with its own captions.
    """
    chance = random.Random(seed)
    expected = Counter()
    ids = []

    for number in range(chance.randrange(2, 5)):
        folder = tmp_path / f"s{number}"
        folder.mkdir()
        names = chance.sample(["1", "2", "01", "a/1", "s0/1", "s1/1", "s0-2/1"], 4)
        captions = [(name, f"{number} {name}") for name in names if chance.random() < 0.8]
        source = write_features(folder / "f.tsv", names)
        if captions:
            found, _ = make(folder, [source], [write_captions(folder / "c", captions)])
        else:
            found, _ = make(folder, [source])

        expected.update(itertools.chain.from_iterable(found.values()))
        (folder / "store").rename(tmp_path / f"store{number}")
        ids.append(list(found))

    joined, manifest = make(tmp_path, [tmp_path / f"store{number}" for number in range(len(ids))])
    assert len(joined) == sum(map(len, ids)), "no two images have one name"
    assert Counter(itertools.chain.from_iterable(joined.values())) == expected
    assert manifest["dropped"] == {}
    several = Counter(itertools.chain.from_iterable(ids))

    for image, texts in joined.items():
        for text in texts:
            number, name = text.split()
            assert image == name or image.startswith(f"store{number}"), (image, text)

    for name, count in several.items():
        assert (name in joined) == (count == 1)


def test_names_that_are_asked_for_mean_one_image_or_none():
    """Check what queries and clicks use, on the cases of builds."""
    ids = ["a.jpg", "1/main.jpg", "2/main.jpg", "007", "COCO_val2014_000000000042", "x/y"]
    numbers = {name: number for number, name in enumerate(ids)}
    asked = ["a", "p/1/main", "main.jpg", "7.jpg", "42", "y.png", "none"]
    assert match_names(asked, numbers) == {"a": 0, "p/1/main": 1, "7.jpg": 3, "y.png": 5}
    assert match_names(["42"], {"COCO_val2014_000000000042": 0}) == {"42": 0}
    assert match_names(["1/main", "2/main"], {"main": 0}) == {}
    assert match_names(["1/main"], {"main": 0}) == {"1/main": 0}
    assert match_names(["7", "007"], {"007": 0}) == {"007": 0}


def test_queries_mean_the_images_that_a_build_would_keep(tmp_path):
    """Check match_names, which queries and clicks use, against the rules of --only."""

    folders = ["", "", "", "a/", "b/", "train/", "val/", "1/", "2/", "devon/"]
    stems = ["1", "01", "7", "main", "longname1", "e\u0301cole-12", "\u00e9cole-12"]
    stems += [f"COCO_{split}2014_00000000000{n}" for split in ("train", "val") for n in (1, 7)]
    endings = ["", ".jpg", ".png", ".npz"]

    def some_names(chance):
        names = [
            "".join([*chance.choices(folders, k=2), chance.choice(stems), chance.choice(endings)])
            for _ in range(chance.randrange(1, 5))
        ]
        return list(dict.fromkeys(names))

    matched = 0
    for seed in range(400):
        ids = some_names(random.Random(f"ids {seed}"))
        asked = some_names(random.Random(f"asked {seed}"))
        images = Images()
        for name in ids:
            images.add(name, source=0, kept=True)

        clashes = Clashes(images, double=set())
        table = CaptionTable.create(tmp_path / f"{seed}.db", [], wanted=asked)
        names = table.wanted_names()
        meanings = [
            (names[meaning.target], number)
            for number, name in enumerate(ids)
            for meaning in table.wanted_as(name)
            if meaning.kind == SAME or clashes.allow(name, meaning)
        ]
        found = match_names(asked, {name: number for number, name in enumerate(ids)})
        assert sorted(found.items()) == sorted(meanings), (ids, asked)
        matched += len(found)

    assert matched > 100
