"""Test tools/shop_report.py on a small generated shop: figures match the evaluations, and several
runs give mean and deviation.
"""

import json
import sys

import numpy as np
import pytest

from megatron_interbert.sample.shop_report import TitleIndex, spread
from tests.launching import evaluate, finetune, launch, ran


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Make a shop and nearly untrained runs of each task; return their folder."""
    folder = tmp_path_factory.mktemp("shop")
    sizes = (
        "--train-products",
        60,
        "--test-products",
        40,
        "--train-queries",
        60,
        "--test-queries",
        30,
        "--train-topics",
        8,
        "--test-topics",
        5,
    )
    code, out, err = launch(sys.executable, "tools/make_shop.py", "--output", folder, *sizes)
    assert code == 0, out + err
    train = folder / "train"
    common = (
        "--model",
        "sample-chinese",
        "--data-path",
        train,
        "--train-iters",
        1,
        "--micro-batch-size",
        4,
        "--global-batch-size",
        4,
        "--data-partitions",
        4,
        "--num-workers",
        0,
        "--ema-decay",
        0,
    )
    queries = ("--queries", train / "queries.jsonl")
    clicks = ("--topics", train / "topics.jsonl", "--clicks", train / "clicks.jsonl")
    ran(*finetune("product_search", *common, *queries, "--save", folder / "search1"))
    ran(*finetune("product_search", *common, *queries, "--no-titles", "--save", folder / "search2"))
    ran(*finetune("recommendation", *common, *clicks, "--save", folder / "recommendation"))

    return folder


def report(shop, *flags):
    code, out, err = launch(
        *(
            sys.executable,
            "tools/shop_report.py",
            "--data-path",
            shop / "test",
            "--output",
            shop / "r.json",
            *flags,
        )
    )
    assert code == 0, out + err
    return json.loads((shop / "r.json").read_text()), out


def test_search(shop):
    found, out = report(shop, "--search", shop / "search1", shop / "search2", "--first-stage", 12)
    needs = [
        json.loads(line)["needs"] for line in (shop / "test/queries.jsonl").read_text().splitlines()
    ]
    flags = (
        "--data-path",
        shop / "test",
        "--queries",
        shop / "test/queries.jsonl",
        "--two-stage",
        12,
    )
    ran(*evaluate("product_search", "--load", shop / "search2", *flags))
    result = json.loads((shop / "search2/evaluation/product_search/result.json").read_text())[
        "metrics"
    ]

    for way, prefix in (("InterBERT", ""), ("first 12 by vectors", "two_stage_")):
        for name in ("R@1", "R@10", "nDCG@5"):
            parts = [
                needs.count(need) * found["search"][need][way][1][name] for need in found["search"]
            ]
            assert sum(parts) / len(needs) == pytest.approx(result[f"{prefix}{name}"], abs=1e-6)

    assert f"{np.mean([f['R@1'] for f in found['search']['title']['InterBERT']]):.1f} ± " in out
    assert "first ten of the full search that the first 12 by vectors hold: " in out
    assert len(found["search"]["title"]["chance"]) == 1
    assert found["search"]["title"]["TF-IDF of titles"][0]["R@10"] > 60, (
        "whatever the last model reads"
    )


def test_recommendation(shop):
    found, out = report(shop, "--recommendation", shop / "recommendation")
    flags = ("--topics", shop / "test/topics.jsonl", "--clicks", shop / "test/clicks.jsonl")
    ran(
        *evaluate(
            "recommendation",
            "--load",
            shop / "recommendation",
            "--data-path",
            shop / "test",
            *flags,
        )
    )
    result = json.loads(
        (shop / "recommendation/evaluation/recommendation/result.json").read_text()
    )["metrics"]
    ways = found["recommendation"]["all that was shown"]
    assert ways["InterBERT"] == [
        pytest.approx({name: result[name] for name in ways["InterBERT"][0]}, abs=1e-6)
    ]
    assert ways["what clicks were drawn by"][0]["AUC"] > max(
        75, ways["TF-IDF of titles"][0]["AUC"], ways["chance"][0]["AUC"]
    )
    kinds = found["recommendation"]["wanted kinds"]
    assert kinds["what clicks were drawn by"][0]["AUC"] > kinds["TF-IDF of titles"][0]["AUC"]
    assert " ± " not in out


def test_tf_idf_by_hand():
    index = TitleIndex(["ab", "AB", "bc", "cd"])
    scores = index.scores("ab")
    assert scores[0] == scores[1] == pytest.approx(1.0)
    b = np.log(4 / 3)
    ab = np.log(4 / 2)
    bc = np.log(4 / 1)
    c = np.log(4 / 2)
    a = np.log(4 / 2)
    query = np.sqrt(np.log(4 / 2) ** 2 + b**2 + ab**2)
    assert a == ab
    assert scores[2] == pytest.approx(b * b / (query * np.sqrt(b**2 + c**2 + bc**2)))
    assert scores[3] == 0
    assert not index.scores("xyz").any()


def test_words():
    assert spread([70.0]) == "70.0"
    assert spread([70.0, 72.0, 74.0]) == "72.0 ± 2.0"
    code, out, err = launch(sys.executable, "tools/shop_report.py")
    assert (code, out) == (2, "")
    assert "give --search RUN or --recommendation RUN" in err
