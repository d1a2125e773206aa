"""Test which training samples are left out because others are evaluated on their images, among
data sets that number theirs alike.
"""

import json

import numpy as np
import pytest

from megatron_interbert.data.image_names import match_across
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.multitask.same_images import SameImages
from megatron_interbert.tasks.placing import Records, leave_out

COCO = "COCO_val2014_000000000042"
GENOME = [
    {"image_id": 42, "coco_id": None, "flickr_id": 7},
    {"image_id": 2345, "coco_id": 42},
    {"image_id": 7, "coco_id": 2345},
]


@pytest.fixture
def image_data(tmp_path):
    """Write image_data.json of Visual Genome."""
    path = tmp_path / "image_data.json"
    path.write_text(json.dumps(GENOME))
    return str(path)


def test_numbers_of_two_data_sets_are_not_the_same_images():
    assert match_across([COCO], {"42": 0, "43": 1}) == {}
    assert match_across(["42"], {COCO: 0}) == {}
    assert match_across([COCO, "42"], {COCO: 0, "42": 1}) == {COCO: 0, "42": 1}
    assert match_across(["42.jpg"], {"42": 0}) == {"42.jpg": 0}
    train = "COCO_train2014_000000000009"
    assert match_across(["images/COCO_train2014_000000000009.jpg"], {train: 3}) == {
        "images/COCO_train2014_000000000009.jpg": 3
    }


def test_images_that_both_have_go_by_both_names(image_data):
    same = SameImages(image_data)
    assert same.others([COCO]) == {"2345"}
    assert same.others(["2345.jpg"]) == {COCO, COCO.replace("val", "train")}
    assert same.others(["42", "a cat", "COCO_train2014_000000000007"]) == set()


class Tuned:
    """Stand for a job with training samples."""

    samples = None


@pytest.mark.parametrize("given", [False, True])
def test_samples_that_are_left_out(image_data, given):
    """Train on Visual Genome while VQA evaluates on COCO's image 42, which is 2345 there."""
    items = [Record(str(n), ("x",), (str(n),), {"yes": 1.0}) for n in (7, 42, 2345, 2346)]
    records = Records("file", items, np.arange(4)[:, None])
    names = {COCO}
    if given:
        names |= SameImages(image_data).others(names)

    job = Tuned()
    lost = leave_out(job, lambda some: some, records, names)
    assert lost == int(given)
    if given:
        assert [record.id for record in job.samples.items] == ["7", "42", "2346"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected image_data.json of Visual Genome"),
        ([3], "image 0"),
        ([{"image_id": "x"}], "image 0"),
        ([{"image_id": 1, "coco_id": "9"}], "'coco_id' is '9', expected a number or null"),
    ],
)
def test_other_files(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        SameImages(str(path))
