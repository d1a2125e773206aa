"""Test tasks that point at regions: overlaps by brute force, REFER's, Visual7W's, Flickr30k
Entities' and GuessWhat's files, losses, rankings on several ranks.
"""

import gzip
import json
import pickle
import random

import numpy as np
import pytest
import torch

from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.model.heads import TaskHead
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.flickr30k_entities.job import ENTITIES
from megatron_interbert.tasks.flickr30k_entities.samples import parse_sentence, read_phrases
from megatron_interbert.tasks.grounding.boxes import overlaps, problem_of
from megatron_interbert.tasks.grounding.job import open_two, samples_by_way
from megatron_interbert.tasks.grounding.prediction import Ranked, rank_regions
from megatron_interbert.tasks.grounding.records import RegionRecord, place_in
from megatron_interbert.tasks.grounding.samples import RegionSamples, RegionSet
from megatron_interbert.tasks.grounding.task import RegionTask
from megatron_interbert.tasks.guesswhat.games import read_games
from megatron_interbert.tasks.guesswhat.guesser import read_dialogues
from megatron_interbert.tasks.guesswhat.oracle import read_turns
from megatron_interbert.tasks.guesswhat.oracle_samples import OracleSamples
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.refcoco.config import RefcocoConfig
from megatron_interbert.tasks.refcoco.job import REFCOCO
from megatron_interbert.tasks.refcoco.refs import read_expressions
from megatron_interbert.tasks.two_stores import TwoStores
from megatron_interbert.tasks.visual7w.job import VISUAL7W
from megatron_interbert.tasks.visual7w.samples import read_questions
from tests.corpus import VOCABULARY
from tests.dist import run_on_ranks
from tests.shared import SHARED, needs_shared
from tests.tasks.test_retrieval import sizes
from tests.tasks.test_vcr import write, write_regions

REAL = SHARED / "data" / "tasks"
CPU = torch.device("cpu")
SIZE = (100.0, 80.0)


def by_pixels(one, other, inclusive):
    """Compute the IoU of boxes with whole corners by counting pixels."""
    more = 1 if inclusive else 0

    def pixels(box):
        x1, y1, x2, y2 = (int(v) for v in box)
        return {(x, y) for x in range(x1, x2 + more) for y in range(y1, y2 + more)}

    both = pixels(one) | pixels(other)
    return len(pixels(one) & pixels(other)) / len(both) if both else 0.0


def test_overlaps_count_pixels():
    draw = np.random.default_rng(0)
    for inclusive in (False, True):
        low = draw.integers(0, 8, (2, 30, 2))
        boxes = np.concatenate([low, low + draw.integers(0, 6, low.shape)], axis=2)
        found = overlaps(boxes[0], boxes[1], "inclusive" if inclusive else "plain")
        for i in range(30):
            for j in range(30):
                assert found[i, j] == pytest.approx(by_pixels(boxes[0, i], boxes[1, j], inclusive))


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([1, 1, 5, 5], ""),
        ([-3, 1, 5, 5], ""),
        ([90, 70, 130, 100], ""),
        ([5, 1, 5, 5], "a box has no area"),
        ([5, 4, 9, 2], "a box has no area"),
        ([100, 1, 120, 5], "a box lies outside the image"),
        ([-9, 1, -2, 5], "a box lies outside the image"),
        ([1, 1, np.nan, 5], "a box is not finite"),
    ],
)
def test_boxes_that_cannot_be_used(box, problem):
    assert problem_of(np.array([box], float), SIZE) == problem


def figures(task, record, ranked, convention="plain"):
    """Return the figures of one sample."""
    records = Records("f", [record], np.zeros((1, 1), np.int64))
    return task.figures_of(records, [ranked], convention)


def test_only_more_than_half_counts():
    target = np.array([[0, 0, 10, 10]], np.float32)
    record = RegionRecord("1", ("x",), ("i",), SIZE, target)
    for box, right in (([0, 0, 10, 5], 0), ([0, 0, 10, 5.1], 100), ([0, 0, 10, 10], 100)):
        ranked = Ranked(np.array([box], float), np.zeros(1, np.float32))
        assert figures(REFCOCO, record, ranked)["accuracy"] == right

    half = Ranked(np.array([[0, 0, 9, 4]], float), np.zeros(1, np.float32))
    tall = RegionRecord("1", ("x",), ("i",), SIZE, np.array([[0, 0, 9, 9]], np.float32))
    assert figures(REFCOCO, tall, half, "inclusive")["accuracy"] == 0  # 10 x 5 of 10 x 10


def test_recall_of_phrases_takes_the_first_right_box():
    targets = np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32)
    record = RegionRecord("1", ("x",), ("i",), SIZE, targets)
    wrong = [20.0, 20, 30, 30]
    for place in range(12):
        boxes = np.array([wrong] * place + [[50, 50, 60, 60]] + [wrong] * 12)[:10]
        found = figures(ENTITIES, record, Ranked(boxes, np.zeros(len(boxes))))
        assert found == {f"R@{k}": 100.0 * (place < k) for k in (1, 5, 10)}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Write stores of annotated and detected regions of six images."""
    folder = tmp_path_factory.mktemp("stores")
    names = [f"COCO_train2014_{number:012d}" for number in range(1, 7)]
    counts = dict(zip(names, (3, 4, 2, 5, 3, 2), strict=True))
    annotated = write_regions(folder / "annotated", counts)
    detected = write_regions(folder / "detected", {n: c + 2 for n, c in counts.items()}, seed=1)
    return TwoStores(annotated, detected, 8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Open the vocabulary of the random stores."""
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return CaptionTokenizer(str(path))


def boxes_of(stores, image):
    """Return the annotated boxes of an image in pixels."""
    return stores.annotated.stores[0].read(image).boxes


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


def random_records(stores, count=9):
    """Make records about random boxes of the stores, some with choices."""
    draw = random.Random(6)
    records = []
    for number in range(count):
        image = draw.randrange(6)
        boxes = boxes_of(stores, image)
        right = draw.randrange(len(boxes))
        choices = boxes if draw.random() < 0.3 else None
        records.append(
            RegionRecord(
                str(number),
                (" ".join(draw.choices(VOCABULARY[6:20], k=draw.randint(1, 7))),),
                (f"COCO_train2014_{image + 1:012d}",),
                SIZE,
                boxes[right : right + 1],
                choices,
                right,
            )
        )
    return place_in(stores, "f", records)


def make_model():
    """Build a small model with a head that scores regions."""
    config = sizes()
    model = InterBert(config, (), task_heads={"t": TaskHead("regions")})
    initialise(model, config, 0, ParallelState())
    return model.eval()


@pytest.mark.parametrize("way", ["all", "_gt", "_det"])
def test_regions_to_choose_among(stores, tokenizer, way):
    records = random_records(stores)
    together = RegionSamples("t", records, stores, tokenizer, 12)
    samples = {"all": together, **samples_by_way(REFCOCO, records, stores, tokenizer, 12)}[way]
    read = 0
    fields, shown = samples.fields(range(len(records)))
    batch = to_batch(fields)
    for row, record in enumerate(records.items):
        own = shown.boxes[shown.owner == row]
        image = int(records.images[row][0])
        annotated = boxes_of(stores, image)
        detected = stores.detected.stores[0].read(image).boxes
        expected = {"all": [annotated, detected], "_gt": [annotated], "_det": [detected]}
        every = np.concatenate(expected[way])[: stores.max_regions]
        read += len(every)
        if record.choices is None:
            np.testing.assert_allclose(own, every, atol=1e-4)
        else:
            shared = overlaps(every, record.choices)
            nearest = {int(n) for n in shared.argmax(axis=0)[shared.max(axis=0) > 0]}
            np.testing.assert_allclose(own, every[sorted(nearest)], atol=1e-4)

    assert len(fields["region_rows"]) == read, "the model sees no other regions"
    assert batch.max_candidates == np.bincount(shown.owner).max()
    summaries = set(batch.summary_rows.tolist())
    assert not summaries & set(batch.candidates.tolist()), "[IMG] is no candidate"


def test_few_regions_leave_both_kinds_something_to_choose(stores, tokenizer):
    records = random_records(stores)
    few = TwoStores(stores.annotated, stores.detected, 2)
    model = make_model()

    for way, samples in samples_by_way(REFCOCO, records, few, tokenizer, 12).items():
        samples.head = "t"
        ranked = rank_regions(model, samples, ParallelState(), torch.device("cpu"), 4)
        kind = few.annotated if way == "_gt" else few.detected
        for row, best in enumerate(ranked):
            boxes = kind.stores[0].read(int(records.images[row][0])).boxes[:2]
            assert np.abs(boxes - best.boxes[0]).max(axis=1).min() < 1e-3


def test_choices_that_no_region_overlaps_are_never_right(stores, tokenizer):
    record = random_records(stores).items[0]
    far = np.array([[4000, 4000, 4010, 4010], [5000, 5000, 5010, 5010]], np.float32)
    record.choices, record.targets, record.facts = far, far[:1], 0
    records = Records("f", [record], np.array([[0, 0]], np.int64))
    samples = samples_by_way(VISUAL7W, records, stores, tokenizer, 12)[""]
    _, shown = samples.fields([0])
    assert len(shown.boxes) == len(boxes_of(stores, 0)) * 2 + 2, "all regions are left to choose"

    for box in shown.boxes:
        assert figures(VISUAL7W, record, Ranked(box[None], np.zeros(1)))["accuracy"] == 0


@pytest.mark.parametrize("kind", ["binary", "softmax"])
def test_loss_against_float64_and_independent_of_the_cut(stores, tokenizer, kind):
    records = random_records(stores)
    samples = RegionSamples("t", records, stores, tokenizer, 12)
    config = RefcocoConfig(data_partitions=1, micro_batch_size=4)
    data = RegionSet(samples, records, config, "plain")
    task = RegionTask("t", kind)
    model = make_model()

    def run(groups):
        batches = [to_batch(data.fields([(0, row) for row in rows])) for rows in groups]
        totals = sum(task.count_targets(batch) for batch in batches)
        loss = 0.0
        for batch in batches:
            loss = loss + task.loss(model(batch), batch, totals)[0]
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return loss, [g for g in gradients if g is not None], batches

    whole, gradients, (batch,) = run([range(9)])
    parts, of_parts, _ = run([range(2), range(2, 3), range(3, 9)])
    torch.testing.assert_close(whole, parts)
    for one, other in zip(gradients, of_parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    _, shown = samples.fields(range(9))
    logits = model(batch).task_outputs["t"].double()
    expected = hits = 0.0
    for row, record in enumerate(records.items):
        own = shown.owner == row
        scores = overlaps(shown.boxes[own], record.targets)[:, 0]
        scores = torch.tensor(np.where(scores < 0.5, 0.0, scores))
        mine = logits[torch.from_numpy(own)]
        hits += float(scores[mine.argmax()] > 0)
        if kind == "binary":
            p = mine.sigmoid()
            expected -= (scores * p.log() + (1 - scores) * (1 - p).log()).sum().item()
        else:
            expected -= (scores / scores.sum() * mine.log_softmax(0)).sum().item()

    assert whole.item() == pytest.approx(expected / 9, rel=1e-5)
    report = task.loss(model(batch), batch, task.count_targets(batch))[1]
    assert report[0, 1].item() == hits
    assert task.metrics(report)["t_accuracy"] == pytest.approx(hits / 9)


def rank_on_ranks(stores, tokenizer, expected):
    """Compare the rankings of a rank with those of one process."""
    samples = RegionSamples("t", random_records(stores), stores, tokenizer, 12)
    found = rank_regions(make_model(), samples, ParallelState(), CPU, 2, 3)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_rankings_are_the_same_on_any_number_of_ranks(stores, tokenizer):
    samples = RegionSamples("t", random_records(stores), stores, tokenizer, 12)
    found = rank_regions(make_model(), samples, ParallelState(), CPU, 100, 3)
    assert [len(entry.boxes) <= 3 for entry in found] == [True] * 9
    fields, shown = samples.fields([4])
    logits = make_model()(to_batch(fields)).task_outputs["t"].detach().numpy()
    best = np.argsort(-logits, kind="stable")[:3]
    np.testing.assert_allclose(found[4].boxes, shown.boxes[best])
    run_on_ranks(2, rank_on_ranks, stores, tokenizer, found)


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


def test_cells_of_a_grid_are_all_trained_on(tmp_path):
    """Open a store whose images have more cells than the default of regions."""
    folder = tmp_path / "grid"
    write_regions(folder, {"1": 7, "2": 5})
    manifest = folder / MANIFEST
    document = json.loads(manifest.read_text())
    document["detector"] = {**(document["detector"] or {}), "grid": [1, 7]}
    manifest.write_text(json.dumps(document))
    config = RefcocoConfig(data_path=str(folder), max_regions=3)
    stores = open_two("", str(folder), config)
    assert config.max_regions == stores.max_regions == 7
    assert stores.read(np.array([[0], [1]])).counts.tolist() == [7, 5]
    assert "--max-regions 7 instead of 3" in config.notes[0]

    given = RefcocoConfig(data_path=str(folder), max_regions=3)
    given.given.add("max_regions")
    assert open_two("", str(folder), given).max_regions == 3
