"""Test made-up files in KDD Cup 2020's format: pictures into a store, queries into JSON lines, and
what is wrong with a line.
"""

import base64
import sys

import numpy as np
import pytest

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.tasks.shop.catalogue import Catalogue
from megatron_interbert.tasks.shop.search_samples import read_queries
from tests.corpus import VOCABULARY
from tests.launching import launch

COLUMNS = (
    "product_id",
    "image_h",
    "image_w",
    "num_boxes",
    "boxes",
    "features",
    "class_labels",
    "query",
    "query_id",
)
BOXES = np.array([[10, 20, 110, 220], [0, 0, 300, 400]], np.float32)  # top, left, bottom, right


def row(product, query, query_id):
    random = np.random.default_rng(product)
    arrays = BOXES, random.normal(size=(2, 16)).astype(np.float32), np.array([3, 33], np.int64)
    return "\t".join(
        [
            str(product),
            "300",
            "400",
            "2",
            *(base64.b64encode(a.tobytes()).decode() for a in arrays),
            query,
            str(query_id),
        ]
    )


def write(path, *rows, header=True):
    path.write_text(
        "\n".join([*(["\t".join(COLUMNS)] if header else []), *rows]) + "\n", encoding="utf-8"
    )
    return path


@pytest.fixture
def source(tmp_path):
    rows = [
        row(11, "red cat", 7),
        row(12, "red cat", 7),
        row(11, "blue dog", 8),
        row(13, "blue dog", 8),
    ]
    return write(tmp_path / "valid.tsv", *rows)


def make(*flags):
    return launch(sys.executable, "tools/make_queries.py", *flags)


def test_a_benchmark_becomes_a_store_and_queries(source, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    code, out, err = launch(
        *(
            sys.executable,
            "tools/build_features.py",
            source,
            "--columns",
            ",".join(COLUMNS),
            "--box-format",
            "yxyx",
        ),
        *(
            "--num-classes",
            34,
            "--class-ids",
            "background-first",
            "--vocab-file",
            tmp_path / "vocab.txt",
            "--max-dropped",
            0.5,
        ),
        *("--workers", 1, "--output", tmp_path / "store"),
    )
    assert code == 0, out + err
    corpus = Corpus([str(tmp_path / "store")])
    items = Catalogue(corpus, CaptionTokenizer(str(tmp_path / "vocab.txt")), False, 16, 10)
    assert items.ids == ["11", "12", "13"], "a product that several queries show is one"
    np.testing.assert_array_equal(corpus.stores[0].read(0).boxes, BOXES[:, [1, 0, 3, 2]])
    (tmp_path / "answers.json").write_text('{"7": [12], "8": [11, 13]}')
    kinds = {
        "train": (),
        "valid": ("--answers", tmp_path / "answers.json"),
        "test": ("--candidates",),
    }
    found = {}

    for name, flags in kinds.items():
        code, out, err = make(source, "--output", tmp_path / f"{name}.jsonl", *flags)
        assert code == 0, out + err
        found[name] = read_queries(str(tmp_path / f"{name}.jsonl"), items, "--queries")
        assert found[name].ids == ["7", "8"]
        assert found[name].texts == ["red cat", "blue dog"]

    assert [p.tolist() for p in found["train"].products] == [[0, 1], [0, 2]]
    assert [p.tolist() for p in found["valid"].products] == [[1], [0, 2]]
    assert [p.tolist() for p in found["valid"].candidates] == [[0, 1], [0, 2]]
    assert found["train"].candidates == [None, None]
    assert not found["test"].labelled


def test_what_is_wrong_is_one_line(source, tmp_path):
    (tmp_path / "answers.json").write_text('{"7": [12]}')
    for flags, line in (
        ((tmp_path / "none.tsv",), "none.tsv: cannot be read"),
        ((write(tmp_path / "short.tsv", "1\t2"),), "short.tsv: line 2 has 2 columns, expected 9"),
        ((write(tmp_path / "empty.tsv"),), "empty.tsv: holds no rows"),
        ((source, "--answers", tmp_path / "answers.json"), "no answer for query 8 of"),
    ):
        code, _, err = make(*flags, "--output", tmp_path / "out.jsonl")
        assert code == 2
        assert "Traceback" not in err
        assert line in err.strip().splitlines()[-1]
        assert not (tmp_path / "out.jsonl").exists()


def test_answers_are_looked_at_before_the_rows(tmp_path):
    (tmp_path / "train.tsv").write_text("one column\n")
    (tmp_path / "answers.json").write_text("[")
    code, _, err = launch(
        *(sys.executable, "tools/make_queries.py", tmp_path / "train.tsv"),
        *("--answers", tmp_path / "answers.json", "--output", tmp_path / "out.jsonl"),
    )
    assert code == 2
    assert "answers.json" in err
