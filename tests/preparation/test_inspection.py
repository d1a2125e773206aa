"""Test the figures of an inspection against plain loops, and its two fault detectors on right and
wrong data, real and generated.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_interbert.data.regions import Regions, repair_boxes
from megatron_interbert.data.store import RegionStore
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from megatron_interbert.preparation.inspection.boxes import BoxFormat
from megatron_interbert.preparation.inspection.class_ids import (
    SHIFTS,
    ClassShift,
    caption_words,
    decide,
    stem,
)
from megatron_interbert.preparation.inspection.counts import Histogram
from megatron_interbert.preparation.inspection.report import InspectionOptions, inspect_store
from megatron_interbert.sample import corpus
from tests.corpus import CLASSES, write_store
from tests.shared import SHARED, needs_shared

DATA = SHARED / "data"
WRONG = {
    "": lambda boxes: boxes,
    "xywh as corners": lambda boxes: np.concatenate(
        [boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1
    ),
    "corners as xywh": lambda boxes: np.concatenate(
        [boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1
    ),
    "x and y swapped": lambda boxes: boxes[:, [1, 0, 3, 2]],
}


def real_images():
    """Yield (id, size, boxes [R, 4], features, class ids [R], confidences [R]) of the real
    images.
    """
    for file in sorted((DATA / "region_features" / "npz").glob("*.npz")):
        with np.load(file, allow_pickle=False) as f:
            ids, confidence = (
                (f["cls_id_1601"], f["cls_conf"])
                if "cls_id_1601" in f
                else (f["cls_prob"].argmax(1), f["cls_prob"].max(1))
            )

            yield (
                file.stem,
                (float(f["image_w"]), float(f["image_h"])),
                f["boxes"].astype(np.float32),
                f["features"],
                ids,
                confidence,
            )


def real_captions():
    captions = {}
    for line in (DATA / "region_features" / "captions.jsonl").read_text().splitlines():
        row = json.loads(line)
        captions.setdefault(row["image_id"], []).append((row["caption"], row["lang"]))

    return captions


def write_real(path, shift=0, boxes=WRONG[""], languages=("en", "zh"), captions_of=None):
    """Write the real images as a store, with class ids shifted, boxes changed, and captions of
    other images, given by their ids.
    """
    names = ["background", *(DATA / "vocab" / "objects_vocab.txt").read_text().splitlines()]
    captions = real_captions()

    with RegionStoreWriter(
        path,
        feature_dim=2048,
        num_classes=1601,
        class_names=names,
        detector={"name": "Faster R-CNN", "revision": ""},
        soft_labels="top_1_confidence",
        images_per_shard=8,
    ) as writer:
        for name, size, corners, features, ids, confidence in real_images():
            labels = np.clip(ids.astype(np.int64) + shift, 0, 1600)[:, None]
            regions = Regions(
                name, size, features, boxes(corners), labels, confidence.astype(np.float32)[:, None]
            )
            texts = captions[captions_of[name] if captions_of else name]
            writer.add(regions, [pair for pair in texts if pair[1] in languages])

    return path


def levels(report, *kinds):
    return {verdict.about: verdict for verdict in report.verdicts if verdict.level in kinds}


@needs_shared
@pytest.mark.parametrize("shift", [0, -1, 1, -2])
@pytest.mark.parametrize("languages", [("en", "zh"), ("zh",)])
def test_shifted_ids_of_real_images_are_found(tmp_path, shift, languages):
    report = inspect_store(
        RegionStore(write_real(tmp_path / "real", shift, languages=languages)), InspectionOptions()
    )
    found = report.class_shift
    assert found["evidence"] == ("captions" if "en" in languages else "places")
    assert found["shift"] == -shift
    others = [row["z"] for row in found["scores"] if row["shift"] != -shift]
    assert max(row["z"] for row in found["scores"]) > max(others) + 4, "by a clear margin"
    problems = levels(report, "problem")
    assert ("class ids" in problems) == (shift != 0)
    if shift == -1:
        assert problems["class ids"].what.startswith("class ids look shifted by +1: names fit ")
        assert problems["class ids"].mend == "rebuild with --class-ids background-none"

    if shift == 1:
        assert problems["class ids"].mend == "rebuild with --class-ids background-first"

    assert "box format" in levels(report, "ok")


@needs_shared
@pytest.mark.parametrize("seed", range(4))
def test_captions_of_other_images_are_found(tmp_path, seed):
    names = [name for name, *_ in real_images()]
    others = np.random.default_rng(seed).permutation(names).tolist()
    wrong = write_real(tmp_path / "wrong", captions_of=dict(zip(names, others, strict=True)))
    found = levels(inspect_store(RegionStore(wrong), InspectionOptions()), "problem")
    assert list(found) == ["pairs"]
    assert found["pairs"].what.endswith("no better than those of other images")

    right = {name: name for name in names}
    half = {**right, **dict(zip(names[::2], names[2::2] + names[:1], strict=True))}
    for number, pairs in enumerate((right, half)):
        store = RegionStore(write_real(tmp_path / str(number), captions_of=pairs))
        assert "pairs" in levels(inspect_store(store, InspectionOptions()), "ok")


def test_captions_of_a_wrong_column_and_what_was_left_out_are_found(tmp_path):
    texts = ["https://x.org/a b.jpg", "https://x.org/1.jpg", "1.jpg", "480", "a dog", "3 dogs"]
    with RegionStoreWriter(
        tmp_path / "store",
        feature_dim=4,
        num_classes=3,
        detector={"name": "x"},
        soft_labels="top_1",
    ) as writer:
        for number, text in enumerate(texts):
            rows = np.random.default_rng(number).random((2, 4))
            boxes = np.array([[0, 0, 5, 5], [1, 2, 9, 8]], np.float32)
            ids, sure = np.ones((2, 1), np.int64), np.ones((2, 1), np.float32)
            writer.add(Regions(str(number), (10.0, 10.0), rows, boxes, ids, sure), [(text, "en")])

    store = RegionStore(str(tmp_path / "store"))
    store.manifest["captions_left_out"] = {"no image of that name": 3}
    store.manifest["dropped"] = {"not in --only": 90}
    report = inspect_store(store, InspectionOptions())
    assert levels(report, "problem")["odd captions"].what == (
        "3 of 6 captions are addresses, names of files or numbers"
    )
    warnings = levels(report, "warning")
    assert "no image of that name (3)" in warnings["captions left out"].what
    assert "images left out" not in warnings, "--only was asked for"


@needs_shared
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("kind", list(WRONG))
def test_wrong_boxes_of_real_images_are_found(tmp_path, kind, recorded):
    store = RegionStore(write_real(tmp_path / "real", boxes=WRONG[kind]))
    if not recorded:
        del store.manifest["inverted_boxes"], store.manifest["repaired_boxes"]

    report = inspect_store(store, InspectionOptions())
    assert report.box_format["found"] == kind
    problems = levels(report, "problem")
    assert list(problems) == (["box format"] if kind else [])
    if kind:
        assert "--box-format" in problems["box format"].mend

    assert report.class_shift["shift"] == 0, "captions do not depend on boxes"


def coco_boxes():
    for line in (DATA / "photos" / "meta.jsonl").read_text().splitlines():
        row = json.loads(line)
        boxes = np.array([box for _, box in row["objects_xywh"]], np.float64).reshape(-1, 4)
        if len(boxes):
            yield (
                np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
                (
                    row["width"],
                    row["height"],
                ),
            )


def judge_boxes(images, change):
    judge = BoxFormat()
    for boxes, size in images:
        judge.add(repair_boxes(np.float32(change(boxes)), size)[0], size)
    return judge.result()


@needs_shared
@pytest.mark.parametrize("kind", list(WRONG))
def test_wrong_boxes_of_few_annotated_objects_are_found(kind):
    assert judge_boxes(coco_boxes(), WRONG[kind])["found"] == kind


def generated_world():
    return corpus.World(0, 0.3)


@pytest.mark.parametrize("kind", list(WRONG))
def test_wrong_boxes_of_the_generated_world_are_found(kind):
    world = generated_world()
    scenes = (world.scene(np.random.default_rng([0, 2, n]), "scene")[0] for n in range(100))
    assert (
        judge_boxes(((scene.boxes, scene.size) for scene in scenes), WRONG[kind])["found"] == kind
    )


@pytest.mark.parametrize("shift", [0, -1, 1])
def test_shifted_ids_of_the_generated_world_are_found(shift):
    world = generated_world()
    evidence, silent = (ClassShift(["background", *corpus.NAMES], 61, 0) for _ in range(2))

    for n in range(100):
        regions, captions = world.scene(np.random.default_rng([0, 2, n]), "scene")
        labels = np.clip(regions.class_ids[:, 0] + shift, 0, 60)
        heights = regions.boxes[:, 1::2].mean(axis=1) / 480
        evidence.add(labels, heights, [text for text, language in captions if language == "en"])
        silent.add(labels, heights, [])

    assert evidence.result()["shift"] == -shift
    assert evidence.result()["captions_fit"]
    assert silent.result()["captions_fit"] is None
    assert silent.result()["evidence"] == "none", "objects of this world may be anywhere"
    assert silent.result()["said"].startswith("not enough evidence")


def test_scores_are_those_of_a_plain_loop():
    random = np.random.default_rng(0)
    names = ["background", "cat", "dog", "red car", "tree,trees", "bus", "house", "bird"]
    told = ["a cat", "two dogs", "the car", "a tree", "buses", "houses", "birds fly", "nothing"]
    images = [
        (random.integers(1, 8, size=4), [told[i] for i in random.integers(0, 8, size=2)])
        for _ in range(50)
    ]
    judge = ClassShift(names, 8, 0)
    for labels, captions in images:
        judge.add(labels, np.full(4, 0.5), captions)

    last = [None, *({stem(part.split()[-1]) for part in name.split(",")} for name in names[1:])]

    def fits(index, captions):
        return 0 < index < 8 and bool(last[index] & caption_words(captions))

    for shift, row in zip(SHIFTS, judge.by_captions(), strict=True):
        assert row["matches"] == sum(
            fits(label + shift, captions) for labels, captions in images for label in set(labels)
        )
        pairs = [
            fits(label + shift, captions)
            for labels, _ in images
            for label in set(labels)
            for _, captions in images
        ]
        assert row["expected"] == pytest.approx(sum(pairs) / len(images), abs=0.051)


def test_the_company_of_words_in_a_large_store_is_no_shift():
    """Check names that never fit, and a neighbour in the vocabulary that is often in the same
    photo.
    """
    rows = [{"shift": shift, "matches": 1000, "expected": 1000.0, "z": 0.0} for shift in SHIFTS]
    rows[3] = {"shift": 1, "matches": 1300, "expected": 1000.0, "z": 9.5}
    assert decide(rows) is None
    rows[3].update(matches=3000, z=63.2)
    assert decide(rows) == 1
    rows[2] = {"shift": 0, "matches": 2500, "expected": 1000.0, "z": 47.0}
    assert decide(rows) is None, "both fit: not clear"


@pytest.mark.parametrize(
    ("boxes", "size", "found"),
    [
        (np.array([[0, 0, 1, 0.9], [0.2, 0.3, 0.4, 0.8]]), (640, 480), "normalised"),
        # a single region of the whole image is no evidence
        (np.array([[0, 0, 640, 480]]), (640, 480), None),
        (
            np.array(
                [
                    [x, y, x + 0.25, y + 0.25]
                    for x in (0, 0.25, 0.5, 0.75)
                    for y in (0, 0.25, 0.5, 0.75)
                ]
            )
            * 640,
            (640, 640),
            "",
        ),
    ],
)
def test_shares_whole_images_and_grids(boxes, size, found):
    assert judge_boxes([(boxes, size)] * 100, WRONG[""])["found"] == found


def test_counts_are_those_of_a_plain_loop(tmp_path):
    store = RegionStore(write_store(tmp_path / "store", images=40))
    report = inspect_store(store, InspectionOptions())
    records = [store.read(number) for number in range(40)]
    rows = [len(regions.features) for regions in records]
    bars = report.histograms["regions_per_image"]
    assert bars["bars"] == np.bincount(rows).tolist()
    assert (bars["least"], bars["most"], bars["median"]) == (
        min(rows),
        max(rows),
        np.quantile(rows, 0.5, method="inverted_cdf"),
    )
    words = [len(store.caption(number).split()) for number in range(store.num_captions)]
    assert report.histograms["caption_words"]["bars"] == np.bincount(words).tolist()
    labels = np.concatenate(
        [r.class_ids[np.arange(len(r.boxes)), r.class_probs.argmax(1)] for r in records]
    )
    seen = np.bincount(labels, minlength=CLASSES)
    assert {row["id"]: row["regions"] for row in report.classes["top"]} == {
        k: n for k, n in enumerate(seen.tolist()) if n
    }
    assert report.classes["never_seen"] == int((seen[1:] == 0).sum())
    area = np.concatenate(
        [(r.boxes[:, 2] - r.boxes[:, 0]) * (r.boxes[:, 3] - r.boxes[:, 1]) / 8000 for r in records]
    )
    edges = report.histograms["box_areas"]["edges"]
    np.testing.assert_array_equal(
        np.cumsum(report.histograms["box_areas"]["bars"]), [(area < edge).sum() for edge in edges]
    )


def test_a_sample_of_a_store_is_spread_evenly(tmp_path):
    store = RegionStore(write_store(tmp_path / "store", images=40))
    report = inspect_store(store, InspectionOptions(max_images=5))
    assert report.counts["inspected"]["images"] == 5
    assert report.readable == [0, 9, 19, 29, 39]
    assert report.counts["images"] == 40


def test_quantiles_and_overflow_of_histograms():
    histogram = Histogram(10)
    for value in [1, 2, 3, 4, 100]:
        histogram.add(value)

    assert histogram.summary() == {
        "count": 5,
        "least": 1,
        "p25": 2,
        "median": 3,
        "p75": 4,
        "p99": 10,
        "most": 10,
        "bars": [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1],
    }
    assert Histogram(3).summary()["bars"] == [0]


def hidden_regions(random, name, features, probs):
    boxes = np.array([[0, 0, 40, 40], [50, 30, 90, 70]], np.float32)
    return Regions(name, (100.0, 80.0), features, boxes, np.array([[0, 1], [0, 2]]), probs)


def test_repeats_emptiness_and_background_are_told(tmp_path):
    random = np.random.default_rng(0)
    with RegionStoreWriter(
        tmp_path / "store",
        feature_dim=4,
        num_classes=5,
        detector={"name": "none", "revision": ""},
        soft_labels="top_k",
        images_per_shard=3,
        class_names=["background", "cat", "dog"],
    ) as writer:
        probs = np.array([[0.6, 0.3], [0.7, 0.2]], np.float32)
        rows = random.normal(size=(9, 2, 4))
        rows[3] = rows[1]  # repeats an image
        rows[4, 0] = 0
        rows[5, 1] = rows[5, 0]
        captions = [[("one two", "en")] for _ in rows]
        captions[6] = [("?!", ""), ("a b", ""), ("a b", "")]
        captions[7] = []
        for number, (features, texts) in enumerate(zip(rows, captions, strict=True)):
            writer.add(hidden_regions(random, f"i{number}", features, probs), texts)

    report = inspect_store(RegionStore(tmp_path / "store"), InspectionOptions())
    said = {verdict.about: verdict for verdict in report.verdicts}
    assert said["zero features"].where == ["shard-00001.h5: image 1 (i4)"]
    assert said["repeated features"].where == ["shard-00001.h5: image 2 (i5)"]
    assert said["repeated images"].where == [
        "shard-00001.h5: image 0 (i3) as shard-00000.h5: image 1 (i1)"
    ]
    assert said["empty captions"].where == ["image 6"]
    assert said["repeated captions"].where == ["image 6"]
    assert said["without captions"].where == ["image 7"]
    assert said["class names"].level == "warning"
    assert said["background"].level == "problem"
    assert (said["box format"].level, said["class ids"].level) == (
        "warning",
        "warning",
    ), "a lack of evidence is reported, nothing is guessed"


def test_regions_without_labels_are_told(tmp_path):
    random = np.random.default_rng(0)
    facts = SimpleNamespace(
        feature_dim=4, num_classes=5, detector={"name": "none", "revision": ""}, soft_labels="none"
    )

    with RegionStoreWriter(tmp_path / "store", **vars(facts)) as writer:
        for n in range(3):
            probs = np.zeros((2, 2), np.float32)
            writer.add(
                hidden_regions(random, f"i{n}", random.normal(size=(2, 4)), probs),
                [(f"words {n}", "en")],
            )

    report = inspect_store(RegionStore(tmp_path / "store"), InspectionOptions())
    assert report.classes["top"] == []
    assert levels(report, "warning")["labels"].what == "no region has a label"
    assert report.problems == 0
