"""Test which training samples are left out because others are evaluated on their images, among
data sets that number theirs alike.
"""

import json

import numpy as np
import pytest

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.image_names import match_across, match_names, may_mean
from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.multitask.image_lists import listed_images
from megatron_interbert.tasks.multitask.same_images import SameImages
from megatron_interbert.tasks.overlaps import leave_out
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.retrieval.config import RetrievalConfig
from megatron_interbert.tasks.retrieval.job import leave_out as leave_out_captions
from megatron_interbert.tasks.retrieval.samples import RetrievalSet
from tests.corpus import write_store

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
    assert lost == (["2345"] if given else [])
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


def test_names_of_uniter_and_visual7w_mean_the_images_themselves():
    coco = {"coco_train2014_000000000009": 0, "coco_val2014_000000000042": 1}
    assert match_names(["COCO_train2014_000000000009", COCO], coco) == {
        "COCO_train2014_000000000009": 0,
        COCO: 1,
    }
    assert match_names(["dev-12-0-img0"], {"nlvr2_dev-12-0-img0.npz": 3}) == {"dev-12-0-img0": 3}
    assert match_names(["1000092795.jpg"], {"flickr30k_000001000092795": 4}) == {
        "1000092795.jpg": 4
    }
    assert match_names(
        ["COCO_train2014_000000581857"], {"visual_grounding_coco_gt_000000581857": 5}
    )
    assert match_across(["v7w_42.jpg"], {"42": 6, COCO: 7}) == {"v7w_42.jpg": 6}


@pytest.mark.parametrize(
    ("excluded", "own", "gone"),
    [
        (["123.jpg"], ["train/123.jpg", "val/123.jpg", "x"], {"train/123.jpg", "val/123.jpg"}),
        (["7"], ["7.jpg", "007.jpg", "70.jpg"], {"7.jpg", "007.jpg"}),
        (["7", "007"], ["0007.jpg"], {"0007.jpg"}),
        (["1/main.jpg"], ["2/main.jpg", "a/1/main.png"], {"a/1/main.png"}),
        (
            ["COCO_train2014_000000000009"],
            ["visual_grounding_coco_gt_000000000009", "COCO_val2014_000000000009.jpg", "9"],
            {"visual_grounding_coco_gt_000000000009", "COCO_val2014_000000000009.jpg"},
        ),
        (["9"], ["COCO_train2014_000000000009", "v7w_9.jpg"], {"v7w_9.jpg"}),
        (["a cat"], ["a dog"], set()),
    ],
)
def test_what_might_be_an_excluded_image_is_left_out(excluded, own, gone):
    assert may_mean(excluded, own) == gone


def test_lists_of_images(tmp_path):
    lines, numbers, array = (tmp_path / f"listed.{ending}" for ending in ("txt", "json", "npy"))
    lines.write_text("42\nCOCO_val2014_000000000007\n\n")
    numbers.write_text('[391895, "x"]')
    np.save(array, np.array([42, 43]))
    assert listed_images(f"{lines},{numbers}") == {
        "42",
        "COCO_val2014_000000000007",
        "391895",
        "x",
    }
    named = listed_images(f"coco:{array}")
    assert COCO in named
    assert len(named) == 6
    assert may_mean(named, [COCO, "42"]) == {COCO}

    bad = tmp_path / "bad.npy"
    for content, message in (
        (b"x", "not an array of NumPy's"),
        (array.read_bytes()[:-4], "not an array of NumPy's"),
    ):
        bad.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            listed_images(str(bad))

    lines.write_text(" \n")
    np.savez(tmp_path / "more.npz", a=np.arange(2))
    (tmp_path / "more.npz").rename(tmp_path / "more.npy")
    with pytest.raises(UsageError, match="not an array of NumPy's"):
        listed_images(str(tmp_path / "more.npy"))
    with pytest.raises(UsageError, match="lists no images"):
        listed_images(str(lines))
    with pytest.raises(UsageError, match="'x' is not a number of COCO"):
        listed_images(f"coco:{numbers}")


def test_retrieval_never_shows_what_is_left_out(tmp_path):
    store = write_store(tmp_path / "store", 12, images_per_shard=5)
    corpus = Corpus([str(store)])
    tokenizer = CaptionTokenizer(str(store / "vocab.txt"))
    config = RetrievalConfig(data_partitions=1, micro_batch_size=2)
    job = Tuned()
    job.samples = RetrievalSet(corpus, tokenizer, config)
    every = job.samples.samples
    gone = [2, 5, 9]

    lost = leave_out_captions(job, [corpus.stores[0].image_id(image) for image in gone])
    assert lost == [str(n) for n in every if corpus.caption_image[n] in gone]
    kept = [caption for caption in every if corpus.caption_image[caption] not in gone]
    assert job.samples.samples.tolist() == kept

    for epoch in range(5):
        fields = job.samples.fields([(epoch, caption) for caption in kept])
        features = to_batch(fields).features.numpy()
        for image in gone:
            first = corpus.stores[0].read(image).features[0]
            assert not (np.abs(features - first).max(axis=1) < 1e-3).any()
