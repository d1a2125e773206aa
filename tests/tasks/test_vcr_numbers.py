"""Test that VCR finds its images in features that ViLBERT numbered."""

import json
import pickle

import numpy as np
import pytest

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.vcr.samples import VcrImages, numbers_of, read_questions
from tests.preparation.formats import encoded, made_up_images, write_lmdb
from tests.preparation.reading_features import built
from tests.shared import SHARED, needs_shared

FIELD = SHARED / "data" / "field"
QUESTION = {
    "objects": ["person", "cup"],
    "question": ["What", "?"],
    "answer_choices": [["a"], ["b"], ["c"], ["d"]],
    "rationale_choices": [["a"], ["b"], ["c"], ["d"]],
}


@needs_shared
def test_vcr_finds_images_by_the_numbers_of_the_official_features(tmp_path):
    place = FIELD / "vcr_numbered"
    corpora = []
    for kind in ("VCR_gt_resnet101", "VCR_resnet101"):
        built(place / f"{kind}_faster_rcnn_genome.lmdb", tmp_path / kind)
        corpora.append(Corpus([str(tmp_path / kind)]))

    stores = VcrImages(*corpora, 100)
    store = corpora[0].stores[0]
    for split, expected in (("train", ["0", "1"]), ("val", ["1000001", "1000002"])):
        found = read_questions(str(place / f"{split}.jsonl"), stores)
        assert not found.dropped
        assert [store.image_id(question.annotated) for question in found.items] == expected
        assert [store.image_id(question.detected) for question in found.items] == expected


def numbered(folder, numbers):
    """Build a store from an LMDB whose rows have only their key as name; return it as VcrImages."""
    rows = []
    for number, image in zip(numbers, made_up_images(len(numbers)), strict=True):
        row = {
            **{"image_h": 80, "image_w": 100, "num_boxes": len(image["boxes"])},
            "boxes": encoded(image["boxes"], np.float32).encode(),
            "features": encoded(image["features"], np.float32).encode(),
        }
        rows.append((number.encode(), pickle.dumps(row, 2)))

    built(write_lmdb(folder / "x.lmdb", rows), folder / "store")
    return VcrImages(None, Corpus([str(folder / "store")]), 100)


def questions(path, *ids):
    lines = [
        {**QUESTION, "img_id": name, "annot_id": name, "img_fn": f"film/shot@{number}.jpg"}
        for number, name in enumerate(ids)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_every_split_has_numbers_of_its_own(tmp_path):
    stores = numbered(tmp_path, ["1", "3", "1000003", "2000003"])
    path = questions(tmp_path / "q.jsonl", "train-3", "val-3", "test-3", "val-1", "test-1")
    found = read_questions(path, stores)
    store = stores.detected.stores[0]
    names = [store.image_id(question.detected) for question in found.items]
    assert names == ["3", "1000003", "2000003"]
    assert sum(found.dropped.values()) == 2, "val-1 and test-1 are not image 1"
    with pytest.raises(UsageError, match="nothing is left"):
        read_questions(questions(tmp_path / "val.jsonl", "val-1"), stores)


def test_numbers_follow_from_the_split():
    assert numbers_of("train-12") == ["12"]
    assert numbers_of("val-1") == ["1000001"]
    assert numbers_of("test-7") == ["2000007"]
    for other in ("movie-7", "val-x", "val-", "val", "train-1-2", "", "train-²"):
        assert numbers_of(other) == [], other
