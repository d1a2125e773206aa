"""Test tasks with fixed answers: real NLVR2 and SNLI-VE files, pairs of images, losses, predictions
on several ranks.
"""

import json
import random
from collections import defaultdict

import numpy as np
import pytest
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.model.heads import TaskHead
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.prediction import predict
from megatron_interbert.tasks.answering.records import Record, place_in
from megatron_interbert.tasks.answering.samples import AnswerSamples, AnswerSet, Targets
from megatron_interbert.tasks.answering.task import AnswerTask
from megatron_interbert.tasks.answering.vocabulary import AnswerList, frequent_answers
from megatron_interbert.tasks.nlvr2 import samples as nlvr2_samples
from megatron_interbert.tasks.nlvr2.job import nlvr2_metrics
from megatron_interbert.tasks.nlvr2.job import submission as nlvr2_submission
from megatron_interbert.tasks.nlvr2.samples import read_statements
from megatron_interbert.tasks.placing import place_records
from megatron_interbert.tasks.snli_ve.job import snli_ve_metrics
from megatron_interbert.tasks.snli_ve.samples import read_pairs
from megatron_interbert.tasks.vqa.config import VqaConfig
from tests.corpus import VOCABULARY, write_store
from tests.dist import run_on_ranks
from tests.shared import SHARED, needs_shared
from tests.tasks.test_retrieval import sizes
from tests.tasks.test_vcr import write, write_regions

REAL = SHARED / "data" / "tasks"
CPU = torch.device("cpu")


class AnyStore:
    """Stand for a corpus that holds every image, for reading files whose images nobody here has."""

    path = "every image"
    stores: tuple = ()
    first_image: tuple = ()


def every_image(monkeypatch, module):
    """Let a task's reader find every image."""

    def found(corpus, files, records, whole=False):
        given = list(records)
        names = {n for r in given if isinstance(r, Record) for n in r.images}
        numbers = {name: (n,) for n, name in enumerate(sorted(names))}
        return place_records(files, given, lambda _: numbers, "everywhere", whole)

    monkeypatch.setattr(module, "place_in", found)


@needs_shared
def test_real_statements_of_nlvr2(monkeypatch):
    every_image(monkeypatch, nlvr2_samples)
    folder = REAL / "nlvr2"
    records = read_statements([str(folder / "dev.json")], AnyStore())
    assert len(records) == 6982
    assert not len(records.drops)
    true = [record.answers == {"True": 1.0} for record in records.items]
    assert sum(true) == 3551
    groups = {record.facts for record in records.items}
    assert len(groups) == 2018
    assert len(read_statements([str(folder / "test1.json")], AnyStore())) == 6967
    balanced = read_statements([str(folder / "balanced_dev.json")], AnyStore())
    assert 0 < len(balanced) < 6982
    first = records.items[0]
    assert first.images == ("dev-850-0-img0", "dev-850-0-img1")

    given = [random.Random(0).choice(["True", "False"]) for _ in records.items]
    for answers in (given, ["True"] * len(true), [str(value) for value in true]):
        metrics = nlvr2_metrics(records.items, answers)
        right = defaultdict(list)
        for line, answer in zip(open(folder / "dev.json"), answers, strict=True):
            entry = json.loads(line)
            split, group, _, sentence = entry["identifier"].split("-")
            right[split, group, sentence].append(entry["label"] == answer)

        flat = [hit for hits in right.values() for hit in hits]
        assert metrics["accuracy"] == pytest.approx(100 * np.mean(flat))
        consistent = [min(hits) for hits in right.values()]
        assert metrics["consistency"] == pytest.approx(100 * np.mean(consistent))

    assert nlvr2_submission(records.items[:2], ["True", "False"]) == (
        "dev-850-0-0,True\ndev-850-2-0,False\n"
    )


@needs_shared
def test_real_pairs_of_snli_ve_by_every_spelling(tmp_path):
    lines = (REAL / "snli_ve" / "sample_pairs.jsonl").read_text().splitlines()
    images = {json.loads(line)["Flickr30K_ID"] for line in lines}
    corpus = write_regions(tmp_path / "s", dict.fromkeys(sorted(images), 3))
    labels = []
    for key, ending in (("Flickr30K_ID", ""), ("Flickr30kID", ""), ("Flikr30kID", ".jpg")):
        entries = [json.loads(line) for line in lines]
        for entry in entries:
            entry[key] = entry.pop("Flickr30K_ID") + ending
        path = write(tmp_path / f"{key}.jsonl", *entries)
        records = read_pairs([path], corpus)
        assert len(records) == 16
        assert all(len(record.texts) == 1 for record in records.items), "the caption is not read"
        labels.append([next(iter(record.answers)) for record in records.items])

    assert labels[0] == labels[1] == labels[2]
    metrics = snli_ve_metrics(records.items, ["neutral"] * 16)
    assert metrics["accuracy"] == pytest.approx(100 * labels[0].count("neutral") / 16)
    assert metrics["neutral"] == 100

    undecided = {**entries[0], "gold_label": "-", "pairID": "x"}
    records = read_pairs([write(tmp_path / "u.jsonl", entries[0], undecided)], corpus)
    assert dict(records.drops.counts) == {"people did not agree on a label": 1}
    for change, message in (
        ({"gold_label": "maybe"}, "label 'maybe', expected contradiction, neutral, entailment"),
        ({"Flikr30kID": ""}, "line 1 has none of Flickr30K_ID, Flickr30kID, Flikr30kID"),
    ):
        path = write(tmp_path / "bad.jsonl", {**entries[0], **change})
        with pytest.raises(UsageError, match=message):
            read_pairs([path], corpus)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Make 14 samples about two images each, of ragged lengths, with scores for some answers."""
    folder = tmp_path_factory.mktemp("asked")
    corpus = Corpus([str(write_store(folder / "store", 12, images_per_shard=5))])
    tokenizer = CaptionTokenizer(str(folder / "store" / "vocab.txt"))
    draw = random.Random(5)
    records = [
        Record(
            str(number),
            (" ".join(draw.choices(VOCABULARY[6:20], k=draw.randint(1, 9))),),
            tuple(f"image-{n}" for n in draw.sample(range(12), 2)),
            {answer: draw.choice([0.3, 0.6, 1.0]) for answer in draw.sample("abcdef", 2)},
        )
        for number in range(14)
    ]
    return place_in(corpus, "f", records), corpus, tokenizer


def make_model(name, head):
    """Build a small model with one task head."""
    config = sizes()
    model = InterBert(config, (), task_heads={name: head})
    initialise(model, config, 0, ParallelState())
    return model.eval()


def test_fields_of_pairs_and_of_images_side_by_side(asked):
    records, corpus, tokenizer = asked
    rows = [3, 0, 7]
    pair = AnswerSamples("nlvr2", records, corpus, tokenizer, 12, 6)
    batch = to_batch(pair.fields(rows))
    assert batch.head == "nlvr2"
    assert len(batch) == 6
    one = AnswerSamples("nlvr2", records, corpus, tokenizer, 12, 6, side_by_side=True)
    wide = to_batch(one.fields(rows))
    assert len(wide) == 3

    start = 0
    for place in range(3):
        end = start + int(batch.region_counts[2 * place : 2 * place + 2].sum())
        both = batch.locations[batch.region_rows][start:end]
        left = int(batch.region_counts[2 * place])
        expected = both.clone()
        expected[:left, 0:3:2] /= 2
        expected[left:, 0:3:2] = (expected[left:, 0:3:2] + 1) / 2
        expected[:, 4] /= 2
        found = wide.locations[wide.region_rows][start:end]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(wide.features[start:end], batch.features[start:end])
        start = end


@pytest.mark.parametrize("soft", [True, False])
def test_loss_against_float64_and_independent_of_the_cut(asked, soft):
    records, corpus, tokenizer = asked
    answers = AnswerList("abcde")  # f cannot be given
    samples = AnswerSamples("t", records, corpus, tokenizer, 12, 6)
    config = VqaConfig(data_partitions=2, micro_batch_size=4)
    data = AnswerSet(samples, Targets(records, answers), config)
    task = AnswerTask("t", 2, soft)
    model = make_model("t", TaskHead("answers", 5, 2))

    def run(groups):
        batches = [to_batch(data.fields([(0, row) for row in rows])) for rows in groups]
        totals = sum(task.count_targets(batch) for batch in batches)
        loss = 0.0
        for batch in batches:
            loss = loss + task.loss(model(batch), batch, totals)[0]
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return loss, [g for g in gradients if g is not None], batches

    whole, gradients, (batch,) = run([range(14)])
    parts, of_parts, _ = run([range(3), range(3, 4), range(4, 14)])
    torch.testing.assert_close(whole, parts)
    for one, other in zip(gradients, of_parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    logits = model(batch).task_outputs["t"].double()
    assert logits.shape == (14, 5)
    expected = 0.0
    for row, record in enumerate(records.items):
        scores = torch.tensor([record.answers.get(a, 0.0) for a in "abcde"], dtype=torch.float64)
        if soft:
            p = logits[row].sigmoid()
            expected -= (scores * p.log() + (1 - scores) * (1 - p).log()).sum()
        else:
            expected -= (scores * logits[row].log_softmax(0)).sum()
    assert whole.item() == pytest.approx(expected.item() / 14, rel=1e-5)

    report = task.loss(model(batch), batch, task.count_targets(batch))[1]
    best = ["abcde"[number] for number in logits.argmax(1)]
    scores = [r.answers.get(answer, 0.0) for r, answer in zip(records.items, best, strict=True)]
    assert float(report[0, 1]) == pytest.approx(sum(scores), rel=1e-5)
    assert float(report[0, 2]) == 14


def test_heads_of_other_tasks_get_a_gradient_of_zeros(asked):
    records, corpus, tokenizer = asked
    samples = AnswerSamples("a", records, corpus, tokenizer, 12, 6)
    heads = {
        "a": TaskHead("answers", 3, 2),
        "b": TaskHead("answers", 4, 1),
        "c": TaskHead("regions"),
    }
    config = sizes()
    model = InterBert(config, (), task_heads=heads)
    initialise(model, config, 0, ParallelState())
    outputs = model(to_batch(samples.fields(range(4)))).task_outputs
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "a": (4, 3),
        "b": (0, 4),
        "c": (0,),
    }
    sum(value.sum() for value in outputs.values()).backward()
    for name in ("b", "c"):
        for parameter in model.task_heads[name].parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()


def predict_on_ranks(path, expected):
    """Compare the predictions of a rank with those of one process."""
    state = ParallelState()
    records, corpus, tokenizer = path
    samples = AnswerSamples("t", records, corpus, tokenizer, 12, 6)
    model = make_model("t", TaskHead("answers", 5, 2))
    found = predict(model, samples, True, state, CPU, 3, 5)
    assert (found.numbers == expected.numbers).all()
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)


def test_predictions_are_the_same_on_any_number_of_ranks(asked):
    records, corpus, tokenizer = asked
    samples = AnswerSamples("t", records, corpus, tokenizer, 12, 6)
    model = make_model("t", TaskHead("answers", 5, 2))
    found = predict(model, samples, True, ParallelState(), CPU, 100, 5)
    assert found.numbers.shape == (14, 5)
    for row in range(14):  # one at a time
        logits = model(to_batch(samples.fields([row]))).task_outputs["t"][0]
        assert found.numbers[row].tolist() == logits.argsort(descending=True).tolist()
        best = logits.sigmoid().max().item()
        assert found.probabilities[row, 0] == pytest.approx(best, abs=1e-6)

    run_on_ranks(3, predict_on_ranks, asked, found)


def test_frequent_answers_are_in_one_order():
    counts = {"b": 9, "a": 9, "c": 12, "d": 8}
    assert frequent_answers(counts.items(), 9).answers == ("c", "a", "b")


def test_statements_of_nlvr2_that_are_none(tmp_path):
    corpus = write_regions(tmp_path / "s", {"dev-1-0-img0": 3, "dev-1-0-img1": 2})
    entry = {"identifier": "dev-1-0-0", "sentence": "a cat", "label": "True"}
    assert len(read_statements([write(tmp_path / "ok.json", entry)], corpus)) == 1
    unlabelled = {k: v for k, v in entry.items() if k != "label"}
    for without in (unlabelled, {**entry, "label": ""}):
        records = read_statements([write(tmp_path / "t.json", without)], corpus)
        assert records.unlabelled("label") == (
            "1 of 1 samples have no label and do not count (first: dev-1-0-0)"
        )
        with pytest.raises(UsageError, match=r"dropped 1: it has no label .* nothing is left"):
            records.labelled("label")

    small = {**entry, "label": "true"}
    records = read_statements([write(tmp_path / "small.json", small)], corpus)
    assert records.items[0].answers == {"True": 1.0}
    for change, message in (
        ({"identifier": "dev-1-0"}, "identifier 'dev-1-0', expected SPLIT-SET-PAIR-STATEMENT"),
        ({"label": "yes"}, "label 'yes', expected True or False"),
        ({"sentence": 3}, "'sentence' is 3, expected str"),
    ):
        with pytest.raises(UsageError, match=message):
            read_statements([write(tmp_path / "bad.json", {**entry, **change})], corpus)

    lost = {**entry, "identifier": "dev-2-0-0"}
    records = read_statements([write(tmp_path / "lost.json", entry, lost)], corpus)
    assert dict(records.drops.counts) == {"its image is not in the region store": 1}
    assert records.report().endswith("(first: dev-2-0-0, image dev-2-0-img0)")
