"""Test caption files in all the formats in which data sets publish them, and all real captions
through the whole data pipeline.
"""

import json
import zlib

import numpy as np
import pytest

from megatron_interbert.config.training import RunConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.data.regions import Regions
from megatron_interbert.data.store import RegionStore
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.captions import (
    CaptionTable,
    guess_format,
    image_key,
    read_captions,
)
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from megatron_interbert.preparation.mining.search import MiningOptions, mine
from tests.shared import SHARED, needs_shared


def write(path, content):
    path.write_text(
        content if isinstance(content, str) else json.dumps(content, ensure_ascii=False),
        encoding="utf-8",
    )
    return str(path)


URL = "http://x.org/a/b_c.jpg"
FILES = {
    "coco": (
        {
            "images": [{"id": 42, "file_name": "000000000042.jpg"}],
            "annotations": [{"image_id": 42, "id": 1, "caption": "Two  cats. "}],
        },
        [("42", "Two cats.", "en"), ("COCO_val2014_000000000042", "Two cats.", "en")],
    ),
    "karpathy": (
        {
            "images": [
                {
                    "filename": "COCO_val2014_000000000042.jpg",
                    "cocoid": 42,
                    "split": "train",
                    "sentences": [{"raw": "A"}, {"raw": "B"}],
                }
            ]
        },
        [("42", "A", "en"), ("000000000042", "B", "en")],
    ),
    "sbu": (
        {"image_urls": [URL], "captions": ["my cat"], "user_ids": ["x"]},
        [("b_c", "my cat", "en"), ("0", "my cat", "en")],
    ),
    "json-dict": (
        {"0001": "one", "x": ["two", "三"]},
        [("1", "one", "en"), ("x", "two", "en"), ("x", "三", "zh")],
    ),
    "conceptual": (
        f"a bird\t{URL}\n",
        [
            ("0", "a bird", "en"),
            (f"0_{zlib.crc32(URL.encode())}", "a bird", "en"),
            ("b_c", "a bird", "en"),
        ],
    ),
    "tsv": ("7.jpg\t一只猫\tzh\n8.jpg\tdog\n", [("7", "一只猫", "zh"), ("8", "dog", "en")]),
    "flickr-tokens": (
        "1000.jpg#0\tA man\n66_1a.jpg#zhc#1 一个人\n",
        [("1000", "A man", "en"), ("66_1a", "一个人", "zh")],
    ),
    "jsonl": (
        "\n".join(
            map(
                json.dumps,
                [
                    {"image_id": "42", "caption": "x y", "lang": "de"},
                    {"id": "9", "img_path": "1007.jpg", "sentences": ["s", "t"]},
                    {"query_id": 3, "query_text": "红色连衣裙", "item_ids": [55, 66]},
                    {"product_id": 5, "query": "shoes"},
                ],
            )
        ),
        [
            ("42", "x y", "de"),
            ("1007", "s", "en"),
            ("1007", "t", "en"),
            ("66", "红色连衣裙", "zh"),
            ("5", "shoes", "en"),
        ],
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_form_is_recognised_and_found_by_the_names_of_its_images(tmp_path, kind):
    content, expected = FILES[kind]
    path = write(tmp_path / "captions", content)
    assert guess_format(path) == kind
    table = CaptionTable.create(tmp_path / "images.db", [path], complain=pytest.fail)
    for image, caption, language in expected:
        assert (caption, language) in table.of_image(image), (image, table.of_image(image))

    assert table.of_image("nobody") == []


def test_one_image_has_one_key():
    for names in (
        ("COCO_train2014_000000000042.jpg", "000000000042", "42", "a/b/42.png", "42.npz"),
        ("667626_18933d713e.jpg#zhc#0", "667626_18933d713e"),
    ):
        assert len({image_key(name) for name in names}) == 1

    assert image_key("0") == image_key("000") == "0"
    assert len({image_key(name) for name in ("a", "A", "42", "42x", "4 2")}) == 5


def test_names_in_a_surer_place_win(tmp_path):
    """Check that a file named 2.jpg in a URL beats line 2, and that a file name beats a data set's
    own numbers.
    """
    table = CaptionTable.create(
        tmp_path / "a.db",
        [
            write(
                tmp_path / "cc.tsv",
                "zero\thttp://a/2.jpg\none\thttp://a/y.jpg\ntwo\thttp://a/z.jpg\n",
            )
        ],
    )
    assert table.of_image("2") == [("two", "en")]
    lines = (
        '{"id": 1, "image": "7.jpg", "caption": "of seven"}\n{"id": 7, "image": "1.jpg", "caption":'
        ' "of one"}\n'
    )
    table = CaptionTable.create(tmp_path / "b.db", [write(tmp_path / "l.jsonl", lines)])
    assert table.of_image("1") == [("of one", "en")]
    two = [
        write(tmp_path / f"{name}.tsv", f"{name}\thttp://a/v.jpg\n") for name in ("train", "val")
    ]
    with pytest.raises(UsageError, match="build a store from each, then join the stores"):
        CaptionTable.create(tmp_path / "c.db", two)


def test_odd_folders_languages_and_single_lines(tmp_path):
    folder = tmp_path / "a#b%41?c"
    folder.mkdir()
    table = CaptionTable.create(
        folder / "images.db", [write(tmp_path / "u.tsv", "1.jpg\ta cat\thttps://x.org/1.jpg\n")]
    )
    assert table.of_image("1") == [("a cat", "en")], (
        "a third column without a language tag is not taken for one"
    )
    assert (
        guess_format(write(tmp_path / "one.jsonl", '{"image": "a.jpg", "caption": "x"}\n'))
        == "jsonl"
    )
    odd = [
        '{"image_id": "\\ud800", "caption": "x"}',
        '{"image_id": "1", "caption": "x", "lang": "\\u0000"}',
    ]
    rows = list(read_captions(write(tmp_path / "odd.jsonl", "\n".join(odd) + "\n")))
    assert "half characters" in rows[0]
    assert rows[1] == (["1"], "x", "en")


def test_splits_of_a_karpathy_file(tmp_path):
    images = [
        {"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": split}]}
        for i, split in enumerate(("train", "val", "restval"))
    ]
    path = write(tmp_path / "k.json", {"images": images})
    assert [row[1] for row in read_captions(path, split="train,restval")] == ["train", "restval"]
    assert len(list(read_captions(path))) == 3


def test_lines_of_no_use_are_complained_of_one_by_one(tmp_path):
    lines = [
        '{"image_id": 1, "caption": "good"}',
        "not json",
        '{"image_id": 2}',
        "[1]",
        '{"image_id": 3, "caption": "  "}',
        '{"image_id": 4, "caption": 5}',
    ]
    rows = list(read_captions(write(tmp_path / "x.jsonl", "\n".join(lines)), "jsonl"))
    assert rows[0] == (["1"], "good", "en")
    assert all(isinstance(row, str) for row in rows[1:])

    for row, word in zip(
        rows[1:], ("line 2", "line 3", "line 4", "empty", "expected text"), strict=True
    ):
        assert word in row

    with pytest.raises(UsageError, match="name it with --captions-format"):
        guess_format(write(tmp_path / "x", "just words\n"))
    with pytest.raises(UsageError, match="not a coco caption file"):
        list(read_captions(write(tmp_path / "c", {"annotations": [{"id": 1}]}), "coco"))


@needs_shared
@pytest.mark.parametrize(
    ("file", "vocabulary", "count", "images"),
    [
        ("coco_val2017.json", "bert-base-uncased", 25_014, 5_000),
        ("flickr8k_zh.txt", "bert-base-chinese", 40_455, 8_091),
    ],
)
def test_all_real_captions_are_tokenised_mined_and_packed(
    tmp_path, file, vocabulary, count, images
):
    """Check that every caption comes once, with a made-up region per image, that hard negatives are
    mined and used, and that the targets are the hidden words.
    """
    by_image = {}
    for keys, text, language in read_captions(str(SHARED / "data" / "captions" / file)):
        by_image.setdefault(image_key(keys[0]), []).append((text, language))

    assert (sum(map(len, by_image.values())), len(by_image)) == (count, images)
    words = (SHARED / "data" / "vocab" / f"{vocabulary}-vocab.txt").read_text(encoding="utf-8")
    facts = {"feature_dim": 2, "num_classes": 3, "detector": {}, "soft_labels": "dense"}

    with RegionStoreWriter(tmp_path / "store", **facts, vocabulary=words) as writer:
        for name, captions in by_image.items():
            box = np.array([[0, 0, 5, 5]], np.float32)
            one = Regions(
                name,
                (10.0, 10.0),
                np.ones((1, 2), np.float16),
                box,
                np.array([[1]]),
                np.ones((1, 1), np.float32),
            )
            writer.add(one, captions)

    store = RegionStore(str(tmp_path / "store"))
    mine(store, MiningOptions(), 2)
    tokenizer = CaptionTokenizer(str(tmp_path / "store" / "vocab.txt"))
    config = RunConfig(
        micro_batch_size=500, hard_negatives=0.5, max_tokens=128, balance_tokens=False
    )
    data = PretrainingSet(Corpus([str(tmp_path / "store")]), tokenizer, config)
    assert data.has_hard_negatives
    seen = []
    hidden = 0
    unknown = 0
    total = 0

    for start in range(0, count, 500):
        samples = np.arange(start, min(start + 500, count))
        fields = data.fields([(0, sample) for sample in samples])
        batch = to_batch(fields)
        seen += batch.sample_ids.tolist()
        ids = fields["token_ids"].copy()
        ids[fields["msm_positions"]] = fields["msm_labels"]
        pieces = np.delete(ids, np.r_[fields["text_offsets"][:-1], fields["text_offsets"][1:] - 1])
        hidden = hidden + len(batch.msm_labels)
        total = total + len(pieces)
        unknown = unknown + (pieces == tokenizer.unknown).sum()
        captions = data.draw_captions(np.zeros(len(samples), int), samples)
        expected = tokenizer.encode_batch([store.caption(int(c)) for c in captions]).ids
        np.testing.assert_array_equal(pieces, expected)

    assert seen == list(range(count))
    assert 0.14 < hidden / total < 0.20
    assert unknown / total < 0.001
    table = store.hard_negatives()
    assert (store.caption_image[table[:, 0]] != store.caption_image)[table[:, 0] >= 0].all()
    assert (table[:, 0] >= 0).mean() > 0.99
