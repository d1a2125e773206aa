"""Test product search and recommendation: pairs in full and alone, samples, vectors, faulty files,
runs from launch to result.
"""

import csv
import dataclasses
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.presets import PRESETS, fit_to_data
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.loading import load_model
from megatron_interbert.tasks.shop.catalogue import Catalogue
from megatron_interbert.tasks.shop.config import ProductSearchConfig, RecommendationConfig
from megatron_interbert.tasks.shop.figures import search_metrics
from megatron_interbert.tasks.shop.scorer import ItemScorer
from megatron_interbert.tasks.shop.search import SearchTask, search
from megatron_interbert.tasks.shop.search_samples import ProductSearchSet, read_queries
from megatron_interbert.tasks.shop.topic_samples import (
    ClickSet,
    read_clicks,
    read_topics,
    topic_text,
)
from megatron_interbert.tasks.shop.topics import ClickTask
from tests.launching import evaluate, finetune, launch, ran, records, train
from tests.shared import SHARED, needs_shared
from tests.tools.building import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop") / "shop"
    sizes = (
        "--train-products",
        80,
        "--test-products",
        40,
        "--train-queries",
        120,
        "--test-queries",
        20,
        "--train-topics",
        12,
        "--test-topics",
        4,
    )
    code, out, err = launch(sys.executable, "tools/make_shop.py", "--output", folder, *sizes)
    assert code == 0, out + err

    return folder


def catalogue(folder, titles=True, max_tokens=40, max_regions=36):
    tokenizer = CaptionTokenizer(str(folder / "vocab.txt"), "chinese")
    return Catalogue(Corpus([str(folder)]), tokenizer, titles, max_tokens, max_regions)


def model_for(items, seed=0):
    sizes = fit_to_data(
        PRESETS["sample-chinese"],
        items.tokenizer.vocab_size,
        items.corpus.feature_dim,
        items.corpus.num_classes,
        "x",
    )
    sizes = dataclasses.replace(sizes, initializer_range=0.5)
    model = InterBert(sizes, ("itm",))
    initialise(model, sizes, seed, ParallelState())

    return model.eval()


def test_the_shop_is_what_it_says(shop):
    """Check that the sample shop's titles are free of [UNK], that its queries fit exactly the
    products they list, and that `needs` says what a query needs to be answered.
    """
    items = {
        r["item_id"]: r
        for r in map(json.loads, (shop / "test" / "items.jsonl").read_text().splitlines())
    }
    listed = catalogue(shop / "test")
    assert listed.corpus.stores[0].manifest["generated"] is True
    assert listed.ids == list(items)

    for number, record in enumerate(items.values()):
        assert listed.title(number) == record["title"]
        assert listed.tokenizer.unknown not in listed.tokenizer.encode(record["title"], 64).ids, (
            record["title"]
        )
        assert record["kind"] in record["title"]

    for query in map(json.loads, (shop / "test" / "queries.jsonl").read_text().splitlines()):
        first = items[query["item_ids"][0]]
        names = [
            name
            for name in ("colour", "pattern", "brand", "material")
            if first[name] in query["query_text"]
        ]

        fitting = [
            key
            for key, item in items.items()
            if query["query_text"].endswith(item["kind"])
            and all(item[name] == first[name] for name in names)
        ]
        assert fitting == query["item_ids"], query
        visible = [first[name] for name in names if name in ("colour", "pattern")]
        told = any(all(word in items[key]["title"] for word in visible) for key in fitting)
        assert query["needs"] == ("title" if not visible else "either" if told else "picture")

    coloured = [item["colour"] in item["title"] for item in items.values()]
    assert 0.3 < np.mean(coloured) < 0.7


def test_pairs_meet_in_full_and_alone(shop):
    """Check the scores of a batch against single passes, pair by pair: one pass of both sides
    together, and one of each side.
    """
    items = catalogue(shop / "train")
    model = model_for(items)
    scorer = ItemScorer(model_for(items), items, CPU)
    texts = scorer.pieces(["红色连衣裙", "Nordo靴子"])
    text_of = np.array([0, 1, 1, 0])
    chosen = np.array([5, 5, 9, 30])
    batch = to_batch(items.both_ways(texts, text_of, chosen, (text_of, chosen)))
    with torch.no_grad():
        logits = model(batch).itm_logits

    full, alone = (logits[:, 0] - logits[:, 1]).chunk(2)
    for row, (text, item) in enumerate(zip(text_of, chosen, strict=True)):
        single = to_batch(
            items.fields(items.in_full([texts[text]], chosen[row : row + 1]), chosen[row : row + 1])
        )
        with torch.no_grad():
            one = model(single).itm_logits[0]

        torch.testing.assert_close(full[row], one[0] - one[1], rtol=1e-4, atol=1e-4)
        vectors = scorer.text_vectors([texts[text]])[0], scorer.item_vectors(np.array([item]))[0]
        bias = model.itm_head.bias.detach()
        torch.testing.assert_close(
            alone[row].item(),
            float(vectors[0] @ vectors[1] + bias[0] - bias[1]),
            rtol=1e-4,
            atol=1e-3,
        )

    np.testing.assert_allclose(
        scorer.match(texts, text_of, chosen), full.numpy(), rtol=1e-4, atol=1e-4
    )
    small = ItemScorer(model, items, CPU, tokens_at_once=60)
    np.testing.assert_allclose(
        small.match(texts, text_of, chosen), full.numpy(), rtol=1e-4, atol=1e-4
    )


def test_what_the_model_reads_of_an_item(shop):
    items = catalogue(shop / "train")
    bare = catalogue(shop / "train", titles=False)
    text = items.tokenizer.encode("红色连衣裙", 40).ids
    (ids, types), *_ = items.in_full([text], np.array([3]))
    title = items.tokenizer.encode(items.title(3), 40).ids
    assert ids.tolist() == [
        items.tokenizer.cls,
        *text,
        items.tokenizer.sep,
        *title,
        items.tokenizer.sep,
    ]
    assert types.tolist() == [0] * (len(text) + 2) + [1] * (len(title) + 1)
    assert bare.in_full([text], np.array([3]))[0][0].tolist() == [
        items.tokenizer.cls,
        *text,
        items.tokenizer.sep,
    ]
    assert bare.items_alone(np.array([3]))[0][0].tolist() == [
        items.tokenizer.cls,
        items.tokenizer.sep,
    ]
    assert bare.title(3) == ""
    assert len(catalogue(shop / "train", max_tokens=12).in_full([text], np.array([3]))[0][0]) == 12


def test_samples_of_search(shop):
    """Check that wrong pairs never belong together, and that a sample is the same whatever else is
    in the batch, but differs in another step.
    """
    items = catalogue(shop / "train")
    queries = read_queries(str(shop / "train" / "queries.jsonl"), items, "--queries")
    config = ProductSearchConfig(data_partitions=4, max_tokens=40)
    samples = ProductSearchSet(queries, items, config)
    together = {
        (text.lower(), p)
        for text, products in zip(queries.texts, queries.products, strict=True)
        for p in products.tolist()
    }
    assert len(samples.query_of) == len(together), (
        "the same text with the same product is one sample"
    )

    for start in range(0, len(samples.query_of), 16):
        chosen = range(start, min(start + 16, len(samples.query_of)))
        batch = to_batch(samples.fields([(3, sample) for sample in chosen]))
        assert batch.labels[: -len(chosen)].tolist() == [0, 1, 1, 1, 1] * len(chosen)
        pairs, choices = read_pairs(batch, items)

        for sample, row in zip(chosen, range(0, len(pairs), 5), strict=True):
            assert pairs[row] == (
                samples.names[samples.query_of[sample]].lower(),
                samples.product_of[sample],
            )
            assert not together & set(pairs[row + 1 : row + 5])
            assert pairs[row + 1][1] == pairs[row + 4][1] == pairs[row][1]
            assert pairs[row + 2][0] == pairs[row + 3][0] == pairs[row][0]

        shown = [product for _, product in choices[0][0]]
        for sample, (row, among, own) in enumerate(choices):
            assert row == [(pairs[5 * sample][0], product) for product in shown]
            assert row[own] == pairs[5 * sample]
            assert among & together == {row[own]}
            assert among >= {*pairs[5 * sample + 2 : 5 * sample + 4], row[own]}

        assert len(set(shown)) == len(shown) > len(chosen)

    pairs, ((_, among, _),) = read_pairs(to_batch(samples.fields([(3, 7)])), items)
    both, (other, again) = read_pairs(to_batch(samples.fields([(3, 2), (3, 7)])), items)
    assert pairs == both[5:]
    assert among == again[1]
    shared = {product for _, product in among} & {product for _, product in other[1]}
    assert len(shared) > 15, "of 32 draws from 80 products"
    later, ((_, among_later, _),) = read_pairs(to_batch(samples.fields([(4, 7)])), items)
    assert pairs != later
    assert among != among_later


def test_near_products_and_near_queries(shop, tmp_path):
    """Check that with mined neighbours the last two pairs of a sample use products near its own."""
    store = tmp_path / "train"
    shutil.copytree(shop / "train", store)
    near = (np.arange(80)[:, None] + np.array([1, 2])) % 80
    np.save(store / "hard_images.npy", near)
    items = catalogue(store)
    queries = read_queries(str(store / "queries.jsonl"), items, "--queries")
    samples = ProductSearchSet(queries, items, ProductSearchConfig(data_partitions=4))
    assert samples.near
    for_product = {
        p: {
            text.lower()
            for text, of in zip(queries.texts, queries.products, strict=True)
            if p in of
        }
        for p in range(80)
    }

    for sample in range(len(samples.known)):
        rows, _ = read_pairs(to_batch(samples.fields([(0, sample)])), items)
        text, own = rows[0]
        wrong = [p for p in near[own] if text not in for_product[p]]
        assert rows[3][1] in (wrong or range(80))
        asked = [for_product[p] - for_product[own] for p in near[own]]
        assert not all(asked) or rows[4][0] in asked[0] | asked[1]


def read_pairs(batch, items):
    """Return the (query, product) of each pair in full and, for each sample's choice alone, its row
    of pairs, those that it may choose, and the label; all recovered from token ids and regions.
    """
    numbers = {
        items.corpus.stores[0].read(number).features[0].tobytes(): number
        for number in range(len(items))
    }
    first_region = np.concatenate([[0], np.cumsum(batch.region_counts.numpy())])
    pairs = []

    for row, image in zip(batch.pair_text.tolist(), batch.pair_image.tolist(), strict=True):
        ids = batch.token_ids[batch.text_offsets[row] : batch.text_offsets[row + 1]].tolist()
        text = items.tokenizer.decode(ids[1 : ids.index(items.tokenizer.sep)]).replace(" ", "")
        pairs.append((text, numbers[batch.features[first_region[image]].numpy().tobytes()]))

    queries, shown = batch.no_choice.shape
    rows = [pairs[start : start + shown] for start in range(5 * queries, len(pairs), shown)]
    among = [
        {pair for pair, no in zip(row, none, strict=True) if not no}
        for row, none in zip(rows, batch.no_choice, strict=True)
    ]

    return pairs[: 5 * queries], list(
        zip(rows, among, batch.labels[-queries:].tolist(), strict=True)
    )


def test_a_query_for_everything_cannot_be_learnt(shop, tmp_path):
    items = catalogue(shop / "test")
    lines = [
        {"query_id": 1, "query_text": "鞋", "item_ids": items.ids},
        {"query_id": 2, "query_text": "包", "item_ids": items.ids},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = ProductSearchSet(
        read_queries(str(tmp_path / "q.jsonl"), items, "--queries"),
        items,
        ProductSearchConfig(data_partitions=2),
    )
    with pytest.raises(UsageError, match="is for every product"):
        samples.fields([(0, 0)])


def test_samples_of_recommendation(shop):
    items = catalogue(shop / "train")
    topics = read_topics(str(shop / "train" / "topics.jsonl"), "--topics")
    clicks = read_clicks(str(shop / "train" / "clicks.jsonl"), topics, items, "--clicks")
    samples = ClickSet(topics, clicks, items, RecommendationConfig(data_partitions=4))
    batch = to_batch(samples.fields([(0, 5), (0, 100)]))
    assert batch.labels.tolist() == [1 - clicks.clicked[5], 1 - clicks.clicked[100]] * 2
    assert 0.03 < clicks.clicked.mean() < 0.5
    record = json.loads((shop / "train" / "topics.jsonl").read_text().splitlines()[0])
    assert topics.texts[0] == topic_text(record["name"], record["description"], record["keywords"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x", "line 1 is not valid JSON"),
        ("[]", "line 1 is not a JSON object"),
        ('{"query_id": 1}', "line 1 has no 'query_text'"),
        ('{"query_id": 1, "query_text": 5}', "line 1: 'query_text' is 5, expected str"),
        ('{"query_id": 1, "query_text": " "}', "line 1: 'query_text' is empty"),
        ('{"query_id": 1, "query_text": "鞋", "item_ids": "7"}', "'item_ids' is not a list"),
        (
            '{"query_id": 1, "query_text": "鞋", "item_ids": ["nowhere"]}',
            "product nowhere is not in",
        ),
        ("", "holds no queries"),
    ],
)
def test_wrong_queries_are_one_line(shop, tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(UsageError, match=message):
        read_queries(str(tmp_path / "q.jsonl"), catalogue(shop / "test"), "--queries")


def test_two_stages_find_what_one_finds_when_they_keep_everything(shop):
    items = catalogue(shop / "test")
    queries = read_queries(str(shop / "test" / "queries.jsonl"), items, "--queries")
    scorer = ItemScorer(model_for(items), items, CPU)
    full = search(scorer, queries, ParallelState())
    kept = search(scorer, queries, ParallelState(), first_stage=40)
    assert all((a == b).all() for a, b in zip(full.found, kept.found, strict=True))
    vectors = scorer.item_vectors(np.arange(40))
    wanted = scorer.text_vectors(scorer.pieces(queries.texts))
    some = search(scorer, queries, ParallelState(), first_stage=5)
    for query, found in enumerate(some.found):
        assert set(found.tolist()) == set(np.argsort(-(vectors @ wanted[query]))[:5].tolist())

    assert some.pairs == 5 * len(queries)
    assert 0 <= search_metrics(some.found, queries.products)["R@10"] <= 100


COMMON = (
    "--model",
    "sample-chinese",
    "--num-workers",
    0,
    "--log-interval",
    1,
    "--lr",
    "1e-3",
    "--micro-batch-size",
    4,
    "--global-batch-size",
    8,
    "--ema-decay",
    0,
)


def test_search_from_training_to_a_servers_file(shop, tmp_path):
    """Check that two ranks train as one does, that an evaluation repeats the run's metrics, the
    page, and the submission files of both benchmarks.
    """
    train_set = shop / "train"
    test_set = shop / "test"
    flags = (
        "product_search",
        *COMMON,
        "--data-path",
        train_set,
        "--queries",
        train_set / "queries.jsonl",
        "--train-iters",
        3,
        "--valid-data-path",
        test_set,
        "--valid-queries",
        test_set / "queries.jsonl",
        "--eval-interval",
        3,
    )
    ran(*finetune(*flags, "--save", tmp_path / "one"))
    code, out, err = train(
        2, *flags, "--save", tmp_path / "two", module="megatron_interbert.finetune"
    )
    assert code == 0, out + err
    for step, record in records(tmp_path / "one").items():
        assert record["loss"] == pytest.approx(records(tmp_path / "two")[step]["loss"], rel=1e-3)

    valid = records(tmp_path / "one", "valid")[3]
    asked = (
        "--load",
        tmp_path / "one",
        "--data-path",
        test_set,
        "--queries",
        test_set / "queries.jsonl",
    )
    out = ran(*evaluate("product_search", *asked, "--two-stage", 10, "--submission", "muge"))
    result = json.loads((tmp_path / "one/evaluation/product_search/result.json").read_text())
    for name in ("R@1", "R@10", "mean_recall", "nDCG@5"):
        assert result["metrics"][name] == pytest.approx(valid[name], abs=1e-6)
        assert f"two_stage_{name}" in out

    page = (tmp_path / "one/evaluation/product_search/result.html").read_text()
    text = json.loads((test_set / "queries.jsonl").read_text().splitlines()[0])["query_text"]
    assert f'<p class="query">{text}</p>' in page
    assert page.count("<figure") == 20 * 8
    assert "src=" not in page
    lines = [
        json.loads(line)
        for line in (
            (tmp_path / "one/evaluation/product_search/submission.jsonl").read_text().splitlines()
        )
    ]
    assert [line["query_id"] for line in lines] == [f"test-q{number:05d}" for number in range(20)]
    assert all(len(set(line["item_ids"])) == 10 for line in lines)
    ran(*evaluate("product_search", *asked, "--submission", "kddcup2020"))
    rows = list(csv.reader((tmp_path / "one/evaluation/product_search/submission.csv").open()))
    assert rows[0] == ["query-id", "product1", "product2", "product3", "product4", "product5"]
    assert [row[1] for row in rows[1:]] == [line["item_ids"][0] for line in lines]


def test_recommendation_from_training_to_result(shop, tmp_path):
    train_set = shop / "train"
    test_set = shop / "test"
    flags = (
        "recommendation",
        *COMMON,
        "--data-path",
        train_set,
        "--topics",
        train_set / "topics.jsonl",
        "--clicks",
        train_set / "clicks.jsonl",
        "--train-iters",
        3,
        "--valid-data-path",
        test_set,
        "--valid-topics",
        test_set / "topics.jsonl",
        "--valid-clicks",
        test_set / "clicks.jsonl",
        "--save",
        tmp_path / "run",
    )
    ran(*finetune(*flags))
    valid = records(tmp_path / "run", "valid")[3]
    asked = (
        "--load",
        tmp_path / "run",
        "--data-path",
        test_set,
        "--topics",
        test_set / "topics.jsonl",
        "--clicks",
        test_set / "clicks.jsonl",
    )
    ran(*evaluate("recommendation", *asked))
    result = json.loads((tmp_path / "run/evaluation/recommendation/result.json").read_text())
    assert result["metrics"] == pytest.approx(
        {name: valid[name] for name in result["metrics"]}, abs=1e-6
    )
    assert result["showings"] == 4 * 40
    code, _, err = launch(*finetune("recommendation", *COMMON, "--data-path", train_set))
    assert (code, err.strip().splitlines()[-1][:28]) == (2, "error: --topics is missing; ")


def test_the_loss_of_search(shop):
    """Check the loss against float64 arithmetic: two classes for pairs in full; for vectors alone,
    a query's own product against its other choices.
    """
    items = catalogue(shop / "train")
    queries = read_queries(str(shop / "train" / "queries.jsonl"), items, "--queries")
    samples = ProductSearchSet(queries, items, ProductSearchConfig(data_partitions=2))
    batch = to_batch(samples.fields([(0, sample) for sample in range(4)]))
    task = SearchTask()
    model = model_for(items)
    output = model(batch)
    loss, report = task.loss(output, batch, task.count_targets(batch))
    expected = torch.nn.functional.cross_entropy(
        output.itm_logits[:20], torch.tensor([0, 1, 1, 1, 1] * 4)
    ).item()
    scorer = ItemScorer(model, items, CPU)
    wins = 0
    vectors = scorer.item_vectors(np.arange(80)).astype(np.float64)

    for row, among, label in read_pairs(batch, items)[1]:
        query, own = row[label]
        scores = vectors @ scorer.text_vectors(scorer.pieces([query]))[0].astype(np.float64)
        kept = scores[[product for _, product in among]]
        expected += (np.logaddexp.reduce(kept) - scores[own]) / 4
        wins += scores[own] == max(kept)

    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert report[:, 2].tolist() == [20, 4]
    assert report[1, 1] == wins


def test_the_loss_of_clicks(shop):
    items = catalogue(shop / "train")
    topics = read_topics(str(shop / "train" / "topics.jsonl"), "--topics")
    clicks = read_clicks(str(shop / "train" / "clicks.jsonl"), topics, items, "--clicks")
    batch = to_batch(
        ClickSet(topics, clicks, items, RecommendationConfig(data_partitions=2)).fields(
            [(0, n) for n in range(6)]
        )
    )
    task = ClickTask()
    output = model_for(items)(batch)
    loss, report = task.loss(output, batch, task.count_targets(batch))
    wrong = torch.from_numpy(1 - clicks.clicked[:6])
    expected = [
        torch.nn.functional.cross_entropy(logits, wrong) for logits in output.itm_logits.chunk(2)
    ]
    torch.testing.assert_close(loss, sum(expected))
    assert report[:, 2].tolist() == [6, 6]


def test_all_topics_and_items_as_parquet(shop, tmp_path):
    """Check the scores against the model's, that a stopped scoring resumes on another number of
    ranks, and that other settings are refused.
    """
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="pyarrow is not installed (pip install -r requirements.txt)"
    )
    train_set = shop / "train"
    test_set = shop / "test"
    flags = (
        "product_search",
        *COMMON,
        "--data-path",
        train_set,
        "--queries",
        train_set / "queries.jsonl",
        "--train-iters",
        1,
    )
    ran(*finetune(*flags, "--save", tmp_path / "run"))
    asked = (
        "topic_scores",
        "--load",
        tmp_path / "run",
        "--data-path",
        test_set,
        "--topics",
        test_set / "topics.jsonl",
        "--output",
        tmp_path / "scores",
        "--items-of-part",
        7,
    )
    assert "160 pairs in 6 parts, 6 of them scored now" in ran(*evaluate(*asked))
    table = parquet.read_table(tmp_path / "scores").to_pydict()
    assert len(set(zip(table["topic_id"], table["item_id"], strict=True))) == 160
    whole = dict(
        zip(zip(table["topic_id"], table["item_id"], strict=True), table["score"], strict=True)
    )
    items = catalogue(test_set, max_tokens=64)
    model, _ = load_model(str(tmp_path / "run"), ("itm",), "auto", CPU)
    topics = read_topics(str(test_set / "topics.jsonl"), "--topics")
    scorer = ItemScorer(model, items, CPU)
    scores = scorer.match(
        scorer.pieces(topics.texts), np.repeat(np.arange(4), 40), np.tile(np.arange(40), 4)
    ).reshape(4, 40)
    expected = {
        (t, i): scores[a, b] for a, t in enumerate(topics.ids) for b, i in enumerate(items.ids)
    }
    assert whole == pytest.approx(expected, rel=1e-3, abs=1e-4)
    for name in ("part-000000007.parquet", "part-000000035.parquet"):
        (tmp_path / "scores" / name).unlink()

    os.truncate(tmp_path / "scores" / "part-000000014.parquet", 100)
    (tmp_path / "scores" / "_part-000000007.parquet.99.new").write_text("half")
    (tmp_path / "scores" / "_mine.new").write_text("of the user")
    code, out, err = train(2, *asked, module="megatron_interbert.evaluate")
    assert code == 0, out + err
    assert "160 pairs in 6 parts, 3 of them scored now" in out
    assert (
        "parts that are damaged or of an earlier version are scored again: part-000000014.parquet"
        in out
    )
    again = parquet.read_table(tmp_path / "scores").to_pydict()
    assert dict(
        zip(zip(again["topic_id"], again["item_id"], strict=True), again["score"], strict=True)
    ) == pytest.approx(whole, rel=1e-4)
    assert [path.name for path in (tmp_path / "scores").glob("*.new")] == ["_mine.new"]
    code, _, err = launch(*evaluate(*asked[:-1], 9))
    assert code == 2
    assert "holds scores of other items_of_part" in err.strip().splitlines()[-1]


@needs_shared
def test_queries_of_muge_in_both_forms(tmp_path):
    """Check the form of the benchmark and that of Chinese-CLIP, against products that a build from
    the same folder has.
    """
    folder = SHARED / "data" / "field" / "muge_texts"
    build(tmp_path / "store", folder / "products.tsv", "--captions", folder / "train_texts.jsonl")
    corpus = Corpus([str(tmp_path / "store")])
    tokenizer = CaptionTokenizer(str(SHARED / "data" / "vocab" / "bert-base-chinese-vocab.txt"))
    catalogue = Catalogue(corpus, tokenizer, True, 8, 8)
    for name in ("muge_queries.jsonl", "train_texts.jsonl"):
        found = read_queries(str(folder / name), catalogue, "--queries")
        assert found.ids == ["8428", "8429", "8430"]
        assert found.texts == ["红色条纹连衣裙", "高级感托特包斜挎", "复古木质茶几"]
        assert [[catalogue.ids[i] for i in items] for items in found.products] == [
            ["1000000"],
            ["1000001", "1000002"],
            ["1000003"],
        ]
