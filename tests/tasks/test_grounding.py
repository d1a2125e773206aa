"""Test tasks that point at regions: overlaps by brute force, what may be chosen, losses, rankings
on several ranks.
"""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.data.packing import to_batch
from megatron_interbert.model.heads import TaskHead
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.flickr30k_entities.job import ENTITIES
from megatron_interbert.tasks.grounding.annotated import TRIED, note_on_annotated
from megatron_interbert.tasks.grounding.boxes import overlaps, problem_of
from megatron_interbert.tasks.grounding.job import open_two, print_report, samples_by_way
from megatron_interbert.tasks.grounding.prediction import Ranked, rank_regions
from megatron_interbert.tasks.grounding.records import RegionRecord, place_in
from megatron_interbert.tasks.grounding.samples import RegionSamples, RegionSet
from megatron_interbert.tasks.grounding.task import RegionTask
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.refcoco.config import RefcocoConfig
from megatron_interbert.tasks.refcoco.job import REFCOCO
from megatron_interbert.tasks.two_stores import TwoStores
from megatron_interbert.tasks.visual7w.job import VISUAL7W
from tests.corpus import VOCABULARY
from tests.dist import run_on_ranks
from tests.tasks.region_stores import SIZE, boxes_of, figures, open_words, write_two_stores
from tests.tasks.test_retrieval import sizes
from tests.tasks.test_vcr import write_regions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Write stores of annotated and detected regions of six images."""
    return write_two_stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Open the vocabulary of the random stores."""
    return open_words(tmp_path_factory.mktemp("words"))


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


def test_annotated_boxes_that_are_not(stores, capsys):
    """Exchange the two stores, leave one out, read too few boxes."""
    items = [
        RegionRecord(str(image), ("x",), ("i",), SIZE, boxes_of(stores, image)[-1:])
        for image in range(6)
    ]
    items.append(RegionRecord("7", ("x",), ("i",), SIZE, np.zeros((0, 4), np.float32)))
    images = np.array([[0, 0], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5], [0, 0]])
    records = Records("f", items, images)
    assert not note_on_annotated(records, stores)

    exchanged = TwoStores(stores.detected, stores.annotated, 8)
    note = note_on_annotated(records, exchanged)
    assert "detected: has a right box for only 0 of 6 samples looked at" in note

    many = Records("f", items[:6] * 100, np.tile(images[:6], (100, 1)))
    assert f"0 of {TRIED} samples" in note_on_annotated(many, exchanged)

    print_report(records, exchanged, SimpleNamespace(is_main=False))
    assert not capsys.readouterr().out
    print_report(records, exchanged, SimpleNamespace(is_main=True))
    assert capsys.readouterr().out == f"{records.report()}\n{note}\n"

    few = TwoStores(stores.annotated, stores.detected, 1)
    assert "--max-regions is large enough" in note_on_annotated(records, few)

    alone = TwoStores(None, stores.detected, 8)
    assert not note_on_annotated(Records("f", items, images[:, 1:]), alone)
    assert not note_on_annotated(Records("f", items[-1:], images[-1:]), exchanged)


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
