"""Test the official files of tasks that point at regions: REFER's, Visual7W's, Flickr30k Entities'
and GuessWhat's.
"""

import gzip
import json
import pickle

import numpy as np
import pytest
import torch

from megatron_interbert.data.packing import to_batch
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.flickr30k_entities.samples import parse_sentence, read_phrases
from megatron_interbert.tasks.grounding.prediction import Ranked
from megatron_interbert.tasks.guesswhat.games import read_games
from megatron_interbert.tasks.guesswhat.guesser import read_dialogues
from megatron_interbert.tasks.guesswhat.oracle import read_turns
from megatron_interbert.tasks.guesswhat.oracle_samples import OracleSamples
from megatron_interbert.tasks.refcoco.refs import read_expressions
from megatron_interbert.tasks.visual7w.job import VISUAL7W
from megatron_interbert.tasks.visual7w.samples import read_questions
from tests.shared import SHARED, needs_shared
from tests.tasks.region_stores import boxes_of, figures, open_words, write_two_stores
from tests.tasks.test_vcr import write

REAL = SHARED / "data" / "tasks"


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Write stores of annotated and detected regions of six images."""
    return write_two_stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Open the vocabulary of the random stores."""
    return open_words(tmp_path_factory.mktemp("words"))


def refs_of(stores, **changes):
    """Make a reference of REFER to the second box of each image, and its instances."""
    images = [
        {"id": n + 1, "file_name": f"COCO_train2014_{n + 1:012d}.jpg", "width": 100, "height": 80}
        for n in range(6)
    ]
    boxes = []
    refs = []
    for n in range(6):
        x1, y1, x2, y2 = boxes_of(stores, n)[1].tolist()
        box = [x1, y1, x2 - x1, y2 - y1]
        boxes.append({"id": 50 + n, "image_id": n + 1, "bbox": box, "segmentation": [[1] * 9]})
        sentences = [{"sent_id": 10 * n + k, "sent": f"red cat {k}", "tokens": []} for k in (0, 1)]
        refs.append(
            {
                "ref_id": n,
                "ann_id": 50 + n,
                "image_id": n + 1,
                "split": "train" if n < 4 else "val",
                "file_name": f"COCO_train2014_{n + 1:012d}_{n}.jpg",
                "category_id": 1,
                "sent_ids": [10 * n, 10 * n + 1],
                "sentences": sentences,
                **changes,
            }
        )
    return refs, {"images": images, "annotations": boxes}


def refer_files(folder, refs, instances, name="refs(unc).p"):
    """Write the two files of REFER."""
    path = folder / name
    path.write_bytes(
        json.dumps(refs).encode() if name.endswith("json") else pickle.dumps(refs, protocol=2)
    )
    (folder / "instances.json").write_text(json.dumps(instances))
    return str(path), str(folder / "instances.json")


@pytest.mark.parametrize("name", ["refs(unc).p", "refs.json"])
def test_expressions_of_refer(stores, tmp_path, name):
    files = refer_files(tmp_path, *refs_of(stores), name)
    records = read_expressions(*files, "train", stores)
    assert len(records) == 8
    assert [record.id for record in records.items[:3]] == ["0", "1", "10"]
    assert records.images[:4].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    np.testing.assert_allclose(records.items[2].targets[0], boxes_of(stores, 1)[1], atol=1e-4)
    with pytest.raises(UsageError, match="has no part 'testA', expected one of train, val"):
        read_expressions(*files, "testA", stores)


class Hostile:
    """Run a command when it is read by pickle."""

    def __reduce__(self):
        return print, ("run",)


def test_pickles_run_nothing(stores, tmp_path, capsys):
    refs, instances = refs_of(stores)
    for content, message in (
        (pickle.dumps([Hostile()]), "not a pickle of plain lists"),
        (pickle.dumps([np.zeros(2)]), "not a pickle of plain lists"),
        (pickle.dumps(refs)[:-20], "not a pickle of plain lists"),
        (b"junk", "not a pickle of plain lists"),
        (pickle.dumps({"a": 1}), "expected a list of references"),
        (pickle.dumps([{**refs[0], "ann_id": "x"}]), "reference 0: 'ann_id' is \"x\""),
    ):
        files = refer_files(tmp_path, refs, instances)
        (tmp_path / "refs(unc).p").write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_expressions(*files, "train", stores)

    assert "run" not in capsys.readouterr().out


def test_expressions_that_cannot_be_used_are_counted(stores, tmp_path):
    refs, instances = refs_of(stores)
    refs[0]["ann_id"] = 999
    refs[1]["image_id"] = 999
    refs[2]["sentences"][0]["sent"] = " "
    instances["images"][3]["file_name"] = "COCO_train2014_000000000099.jpg"
    refs[4]["split"] = "train"
    instances["annotations"][4]["bbox"] = [200, 3, 5, 5]
    refs[5]["split"] = "train"
    instances["annotations"][5]["bbox"] = [3, 3, 0, 5]
    records = read_expressions(*refer_files(tmp_path, refs, instances), "train", stores)
    assert len(records) == 1
    assert dict(records.drops.counts) == {
        "--instances has no box for it": 2,
        "--instances has no such image": 2,
        "the expression has no text": 1,
        "its image is not in the region store": 2,
        "a box lies outside the image": 2,
        "a box has no area": 2,
    }
    with pytest.raises(UsageError, match="every sample must be answered"):
        read_expressions(
            str(tmp_path / "refs(unc).p"),
            str(tmp_path / "instances.json"),
            "train",
            stores,
            whole=True,
        )


def visual7w(stores, **changes):
    """Make a file of Visual7W: a question about each image with four boxes."""
    images = []
    boxes = []
    for n in range(6):
        regions = [*boxes_of(stores, n), [1, 1, 9, 9], [60, 50, 70, 70]][:4]
        for place, box in enumerate(regions):
            x1, y1, x2, y2 = (float(v) for v in box)
            number = 10 * n + place
            boxes.append({"box_id": number, "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1})
        pair = {"qa_id": n, "question": "which cat", "answer": 10 * n + 1}
        pair["multiple_choices"] = [10 * n, 10 * n + 2, 10 * n + 3]
        file = f"COCO_train2014_{n + 1:012d}.jpg"
        images.append({"image_id": n + 1, "filename": file, "split": "train", "qa_pairs": [pair]})
    return {"images": images, "boxes": boxes, **changes}


def test_questions_of_visual7w(stores, tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(visual7w(stores)))
    records = read_questions(str(path), "train", stores)
    assert len(records) == 6
    first = records.items[0]
    assert first.choices.shape == (4, 4)
    np.testing.assert_allclose(first.targets[0], boxes_of(stores, 0)[1], atol=1e-4)
    for place in range(4):
        ranked = Ranked(first.choices[place : place + 1] + 0.2, np.zeros(1))
        accuracy = figures(VISUAL7W, first, ranked)["accuracy"]
        assert accuracy == 100.0 * (place == first.facts)

    document = visual7w(stores)
    document["images"][0]["qa_pairs"][0]["answer"] = 777
    document["images"][1]["qa_pairs"][0]["question"] = ""
    path.write_text(json.dumps(document))
    records = read_questions(str(path), "train", stores)
    assert dict(records.drops.counts) == {
        "the file does not hold one of its boxes": 1,
        "the question has no text": 1,
    }
    path.write_text(json.dumps({"images": [{"image_id": 1}]}))
    with pytest.raises(UsageError, match="images 0 has no 'split'"):
        read_questions(str(path), "train", stores)


@needs_shared
def test_real_sentences_of_flickr30k_entities():
    lines = (REAL / "flickr30k_entities" / "sentences" / "1.txt").read_text().splitlines()
    text, phrases = parse_sentence(lines[1])
    assert text == "A woman in black , seen from behind , sits next to a body of water ."
    assert [(p.text, p.chain, p.kinds) for p in phrases] == [
        ("A woman", "221796", ("people",)),
        ("black", "221797", ("clothing",)),
        ("behind", "221800", ("other",)),
        ("a body of water", "221798", ("scene",)),
    ]
    for path in (REAL / "flickr30k_entities" / "sentences").iterdir():
        for line in path.read_text().splitlines():
            text, phrases = parse_sentence(line)
            assert "[" not in text
            assert "EN#" not in text
            assert len(phrases) == line.count("[/EN#")
            assert all(phrase.text in text for phrase in phrases)


def entities_folder(folder, stores):
    """Write Entities of the first two images: two chains with boxes, a scene, and no box."""
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(exist_ok=True)
    for n in (0, 1):
        name = f"COCO_train2014_{n + 1:012d}"
        (folder / "Sentences" / f"{name}.txt").write_text(
            "[/EN#7/people/other A cat] near [/EN#8/other red cars] in [/EN#9/scene the house]\n"
            "[/EN#0/notvisual it] runs under [/EN#8/other cars]\n\n"
        )
        objects = ""
        for chain, box in ((7, 0), (8, 0), (8, 1)):
            corners = boxes_of(stores, n)[box] + 1
            sides = zip(("xmin", "ymin", "xmax", "ymax"), corners.tolist(), strict=True)
            inner = "".join(f"<{side}>{value:.4f}</{side}>" for side, value in sides)
            objects += f"<object><name>{chain}</name><bndbox>{inner}</bndbox></object>"
        objects += "<object><name>9</name><scene>1</scene><nobndbox>0</nobndbox></object>"
        size = "<size><width>100</width><height>80</height><depth>3</depth></size>"
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation>{size}{objects}</annotation>"
        )
    images = folder / "train.txt"
    images.write_text("COCO_train2014_000000000001\nCOCO_train2014_000000000002\n")
    return str(folder), str(images)


def test_phrases_of_flickr30k_entities(stores, tmp_path):
    files = entities_folder(tmp_path, stores)
    records = read_phrases(*files, stores)
    assert [record.texts[0] for record in records.items] == ["A cat", "red cars", "cars"] * 2
    assert [len(record.targets) for record in records.items] == [1, 2, 2] * 2
    np.testing.assert_allclose(records.items[1].targets, boxes_of(stores, 0)[:2], atol=1e-3)
    merged = read_phrases(*files, stores, context=True, merged=True).items[1]
    both = boxes_of(stores, 0)[:2]
    expected = [*both[:, :2].min(axis=0), *both[:, 2:].max(axis=0)]
    np.testing.assert_allclose(merged.targets, [expected], atol=1e-3)
    assert merged.texts == ("red cars", "A cat near red cars in the house")

    content = records.content
    (tmp_path / "UNRELATED_CAPTIONS").write_text("# format\nCOCO_train2014_000000000001 2\n")
    fewer = read_phrases(*files, stores, whole=True)
    assert len(fewer) == 5
    assert fewer.drops.counts["the sentence is unrelated to the image"] == 2
    assert fewer.content != content
    sentences = tmp_path / "Sentences" / "COCO_train2014_000000000002.txt"
    sentences.write_text(sentences.read_text().replace("cat", "dog"))
    assert read_phrases(*files, stores).content not in (content, fewer.content)
    path = tmp_path / "Annotations" / "COCO_train2014_000000000001.xml"
    for content in ("<annotation>", "<annotation><size/></annotation>"):
        path.write_text(content)
        with pytest.raises(UsageError, match="not an annotation of Flickr30k Entities"):
            read_phrases(*files, stores)
    path.unlink()
    with pytest.raises(UsageError, match="--entities has no Annotations"):
        read_phrases(*files, stores)


def game(stores, n, **changes):
    """Make a game of GuessWhat about the second box of an image."""
    objects = []
    for place, (x1, y1, x2, y2) in enumerate(boxes_of(stores, n).tolist()):
        box = [x1, y1, x2 - x1, y2 - y1]
        objects.append({"id": place, "bbox": box, "category": "cat", "category_id": 1})
    return {
        "id": n,
        "object_id": 1,
        "picture": {
            "file_name": f"COCO_train2014_{n + 1:012d}.jpg",
            "width": 100,
            "height": 80,
        },
        "objects": objects,
        "qas": [
            {"id": 10 * n, "q": "is it a cat?", "a": "Yes"},
            {"id": 10 * n + 1, "q": "is it red?", "a": "N/A"},
        ],
        "status": "success",
        **changes,
    }


def older(entry):
    """Spell a game as the first form of the data set does."""
    objects = {str(found["id"]): found for found in entry["objects"]}
    turns = [
        {"question_id": turn["id"], "question": turn["q"], "answer": turn["a"]}
        for turn in entry["qas"]
    ]
    rest = {k: v for k, v in entry.items() if k not in ("id", "picture", "objects", "qas")}
    return {
        "dialogue_id": entry["id"],
        "image": entry["picture"],
        "objects": objects,
        "qas": turns,
        **rest,
    }


def test_games_of_guesswhat(stores, tmp_path):
    games = [game(stores, n) for n in range(3)]
    new = write(tmp_path / "new.jsonl", *games)
    old = tmp_path / "old.jsonl.gz"
    old.write_bytes(gzip.compress("".join(json.dumps(older(g)) + "\n" for g in games).encode()))
    for one, other in zip(read_games([new]), read_games([str(old)]), strict=True):
        assert (one.image, one.turns, one.target) == (other.image, other.turns, other.target)
        np.testing.assert_array_equal(one.boxes, other.boxes)

    records = read_dialogues([new], stores)
    assert records.items[0].texts == (
        "start is it a cat? answer Yes stop start is it red? answer N/A stop",
    )
    assert [record.facts for record in records.items] == [1, 1, 1]

    games[0]["status"] = "incomplete"
    games[1]["qas"] = []
    records = read_dialogues([write(tmp_path / "g.jsonl", *games)], stores)
    assert dict(records.drops.counts) == {
        "the game came to no guess": 1,
        "the game has no questions": 1,
    }
    for change, message in (
        ({"object_id": 77}, "object 77 is not among its objects"),
        ({"objects": []}, "'objects' holds none"),
        ({"qas": [{"id": 1, "q": "?", "a": "maybe"}]}, 'answer "maybe", expected one of Yes'),
        ({"picture": {"width": 3}}, "picture has no 'height'"),
    ):
        path = write(tmp_path / "bad.jsonl", game(stores, 0, **change))
        with pytest.raises(UsageError, match=message):
            list(read_games([path]))
    old.write_bytes(old.read_bytes()[:-12])
    with pytest.raises(UsageError, match="damaged"):
        list(read_games([str(old)]))


def test_the_oracle_sees_its_object_beside_the_scene(stores, tokenizer, tmp_path):
    path = write(tmp_path / "g.jsonl", *(game(stores, n) for n in range(3)))
    records = read_turns([path], stores.annotated)
    assert [record.texts for record in records.items[:2]] == [
        ("is it a cat?", "cat"),
        ("is it red?", "cat"),
    ]
    samples = OracleSamples("o", records, stores.annotated, tokenizer, 16, 8)
    batch = to_batch(samples.fields([0, 5]))
    assert batch.region_counts.tolist() == [4, 3]
    start = 0
    for row, (image, count) in enumerate(((0, 4), (2, 3))):
        places = batch.locations[batch.region_rows][start : start + count].numpy()
        shares = boxes_of(stores, image) / np.array([100, 80, 100, 80])
        scene = shares.copy()
        scene[:, 0::2] /= 2
        np.testing.assert_allclose(places[:-1, :4], scene, atol=1e-5)
        beside = shares[1].copy()
        beside[0::2] = (beside[0::2] + 1) / 2
        np.testing.assert_allclose(places[-1, :4], beside, atol=1e-5)
        features = batch.features[start : start + count]
        torch.testing.assert_close(features[-1], features[1])
        start += count
        assert row < 2


def test_games_that_are_all_unfinished_say_why(stores, tmp_path):
    path = write(tmp_path / "g.jsonl", game(stores, 1, status="incomplete"))
    for read, place in ((read_dialogues, stores), (read_turns, stores.annotated)):
        with pytest.raises(UsageError, match="dropped 1: the game came to no guess"):
            read([path], place)
