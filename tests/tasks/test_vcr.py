"""Test VCR: real annotations, references, truncation, the eight pairs, dropped questions, metrics,
the submission file.
"""

import json

import numpy as np
import pytest
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from megatron_interbert.tasks.vcr.config import VcrConfig
from megatron_interbert.tasks.vcr.job import (
    VcrTask,
    check_labels,
    predict,
    submission_lines,
    vcr_metrics,
)
from megatron_interbert.tasks.vcr.samples import (
    BadQuestion,
    VcrImages,
    VcrSet,
    VcrTexts,
    parse_question,
    read_questions,
    render,
)
from tests.corpus import CLASSES, FEATURES, VOCABULARY, random_regions
from tests.shared import SHARED, needs_shared
from tests.tasks.test_retrieval import sizes

CPU = torch.device("cpu")
RECORD = {
    "objects": ["person", "car", "person"],
    "img_fn": "movie/shot@0.jpg",
    "annot_id": "train-0",
    "question": ["is", [0, 2], "near", [1], "?"],
    "answer_choices": [["a", [2], "sits"], ["a", "cat"], ["the", "dog", "runs"], ["a", "tree"]],
    "answer_label": 2,
    "rationale_choices": [["a", "old", [1]], ["the", "house"], ["a", "red", "cat"], [[0], "runs"]],
    "rationale_label": 3,
}


def write_regions(path, counts, seed=0):
    random = np.random.default_rng(seed)
    facts = {
        "feature_dim": FEATURES,
        "num_classes": CLASSES,
        "detector": {"name": "random"},
        "soft_labels": "top_k",
    }

    with RegionStoreWriter(path, **facts, vocabulary="\n".join(VOCABULARY) + "\n") as writer:
        for name, count in counts.items():
            regions = random_regions(random, name)
            while len(regions.features) < count:
                regions = random_regions(random, name)
            for field in ("features", "boxes", "class_ids", "class_probs"):
                setattr(regions, field, getattr(regions, field)[:count])
            writer.add(regions, [])

    return Corpus([str(path)])


@pytest.fixture
def images(tmp_path):
    annotated = write_regions(tmp_path / "annotated", {"other": 2, "shot@0": 3})
    return VcrImages(
        annotated, write_regions(tmp_path / "detected", {"shot@0": 5, "other": 4}, seed=1), 6
    )


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return VcrTexts(CaptionTokenizer(str(tmp_path / "vocab.txt")), 12, 16)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_references_become_names():
    question = parse_question(RECORD)
    assert question.question == "is Casey and Riley near car ?"
    assert question.answers[0] == "a Riley sits"
    assert question.rationales[0] == "a old car"
    assert (question.answer_label, question.rationale_label) == (2, 3)
    crowd = render([[16]], [*(f"x{i}" for i in range(16)), "y"])
    assert crowd == "y"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": ["is", [3]]}, "reference to an object that does not exist"),
        ({"question": ["is", [-1]]}, "reference to an object that does not exist"),
        ({"question": []}, "empty text"),
        ({"question": "is it"}, "text is not a list of words"),
        ({"answer_label": 4}, "label outside 0 to 3"),
        ({"answer_choices": RECORD["answer_choices"][:3]}, "not four options"),
        ({"objects": "person"}, "objects are not a list of names"),
        ({"img_fn": ""}, "img_fn names no image"),
        ({"img_fn": "movie/lost.jpg"}, "its image is not in the store of annotated regions"),
        (
            {"objects": ["person", "car", "person", "cat"]},
            "the numbers of annotated boxes and of objects differ",
        ),
    ],
)
def test_unusable_questions_are_dropped_and_counted(tmp_path, images, change, reason):
    bad = {**RECORD, "annot_id": "train-1", **change}
    found = read_questions(write(tmp_path / "q.jsonl", RECORD, bad, RECORD), images)
    assert len(found.items) == 2
    assert found.report().endswith(f"2 questions; dropped 1: {reason} (first: train-1)")
    with pytest.raises(UsageError, match=r"line 2 \(train-1\): .*every question must be answered"):
        read_questions(write(tmp_path / "q.jsonl", RECORD, bad), images, whole=True)
    with pytest.raises(UsageError, match="nothing is left"):
        read_questions(write(tmp_path / "q.jsonl", bad), images)


def test_files_that_are_no_annotations(tmp_path, images):
    (tmp_path / "q.jsonl").write_text("{\n")
    with pytest.raises(UsageError, match="line 1 is not a JSON object"):
        read_questions(str(tmp_path / "q.jsonl"), images)
    with pytest.raises(UsageError, match="line 1 has no 'question'"):
        read_questions(
            write(tmp_path / "q.jsonl", {k: v for k, v in RECORD.items() if k != "question"}),
            images,
        )

    with pytest.raises(UsageError, match="both missing"):
        VcrImages(None, None, 6)


def test_annotated_regions_come_first(tmp_path, images):
    (question,) = read_questions(write(tmp_path / "q.jsonl", RECORD), images).items
    regions = images.read([question])
    exact = images.annotated.stores[0].read(1)
    found = images.detected.stores[0].read(0)
    assert regions.offsets.tolist() == [0, 6], "3 annotated and 5 detected, cut at 6"
    np.testing.assert_array_equal(
        regions.features, np.concatenate([exact.features, found.features])[:6]
    )
    boxes = np.concatenate([exact.boxes, found.boxes])[:6] / np.array([100, 80, 100, 80])
    np.testing.assert_allclose(regions.locations()[:, :4], boxes, atol=1e-6)
    np.testing.assert_allclose(
        regions.locations()[:, 4],
        (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        atol=1e-6,
    )
    alone = VcrImages(None, images.detected, 6)
    (question,) = read_questions(write(tmp_path / "q.jsonl", RECORD), alone).items
    np.testing.assert_array_equal(alone.read([question]).features, found.features)


def test_eight_pairs_of_a_question(tmp_path, images, texts):
    """Check that each option comes with the whole question, however long the options before it;
    token types; and the right answer before the rationales.
    """
    long = {**RECORD, "answer_choices": [["a"] * 30, *RECORD["answer_choices"][1:]]}
    questions = read_questions(write(tmp_path / "q.jsonl", RECORD, long), images)
    samples = VcrSet(questions, images, texts, VcrConfig(micro_batch_size=2, data_partitions=1))
    fields = samples.fields([(0, 0), (0, 1)])
    assert fields["labels"].tolist() == [2, 3, 2, 3]
    ids = np.split(fields["token_ids"], fields["text_offsets"][1:-1])
    types = np.split(fields["token_types"], fields["text_offsets"][1:-1])
    assert len(ids) == 16
    tokenizer = texts.tokenizer

    def pieces(text):
        return tokenizer.encode(text, 99).ids.tolist()

    for first in (0, 8):
        assert ids[first + 1].tolist() == [
            *(
                tokenizer.cls,
                *pieces("is Casey and Riley near car ?"),
                tokenizer.sep,
                *pieces("a cat"),
                tokenizer.sep,
            )
        ]
        context = pieces("is Casey and Riley near car ?") + pieces("the dog runs")
        row = ids[first + 6].tolist()
        kept = row.index(tokenizer.sep) - 1
        assert row[1 : 1 + kept] == context[:kept]
        assert row[2 + kept : -1] == pieces("a red cat")

    for row, kind in zip(ids, types, strict=True):
        assert (row == tokenizer.sep).sum() == 2
        assert kind.tolist() == [0] * (row.tolist().index(tokenizer.sep) + 1) + [1] * (
            len(row) - row.tolist().index(tokenizer.sep) - 1
        )

    assert max(len(row) for row in ids[:4] + ids[8:12]) <= 12
    assert max(len(row) for row in ids) <= 16
    batch = to_batch(fields)
    assert batch.region_counts.tolist() == [6] * 16

    config = sizes()
    model = InterBert(config, ("choice",))
    initialise(model, config, 0, ParallelState())
    output = model.eval()(batch)
    task = VcrTask()
    loss, report = task.loss(output, batch, task.count_targets(batch))
    logits = output.choice_logit.view(2, 2, 4).double()
    expected = -sum(
        logits[:, part].log_softmax(1)[:, label].mean() for part, label in ((0, 2), (1, 3))
    )
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    assert report[:, 2].tolist() == [2, 2]
    answers, rationales = predict(model, questions.items, images, texts, ParallelState(), CPU, 1)
    np.testing.assert_allclose(np.stack([answers, rationales], 1), logits.detach(), atol=1e-4)
    same, every = predict(
        model, questions.items, images, texts, ParallelState(), CPU, 2, every_answer=True
    )
    np.testing.assert_allclose(same, answers, atol=1e-4)
    np.testing.assert_allclose(every[:, 2], rationales, atol=1e-4)

    lines = submission_lines(questions.items, same, every)
    header = lines[0].split(",")
    assert len(header) == 1 + 4 + 16
    assert header[:6] == [
        "annot_id",
        "answer_0",
        "answer_1",
        "answer_2",
        "answer_3",
        "rationale_conditioned_on_a0_0",
    ]
    values = np.array(lines[1].split(",")[1:], float).reshape(5, 4)
    np.testing.assert_allclose(values.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(
        values[3], np.exp(every[0, 2]) / np.exp(every[0, 2]).sum(), atol=1e-5
    )


def test_both_must_be_right(tmp_path, images):
    items = read_questions(write(tmp_path / "q.jsonl", *[RECORD] * 4), images).items
    right = np.eye(4)[2]
    wrong = np.eye(4)[0]
    answers = np.stack([right, right, wrong, wrong])
    rationales = np.eye(4)[[3, 1, 3, 1]]
    assert vcr_metrics(items, answers, rationales) == {"q_a": 50.0, "qa_r": 50.0, "q_ar": 25.0}
    unlabelled = {k: v for k, v in RECORD.items() if "label" not in k}
    questions = read_questions(write(tmp_path / "q.jsonl", unlabelled), images)
    with pytest.raises(UsageError, match="not all questions have labels"):
        check_labels(questions)
    with pytest.raises(UsageError, match="cannot be trained on"):
        VcrSet(questions, images, None, VcrConfig())


@needs_shared
def test_real_annotations(tmp_path):
    folder = SHARED / "data" / "vcr"
    train, val = (
        json.loads((folder / name).read_text().splitlines()[0])
        for name in ("train_r2c_comment.jsonl", "val.jsonl")
    )
    first = parse_question(train)
    assert first.question == "Does Jessie feel comfortable ?"
    assert first.answers[first.answer_label] == "No she does not ."
    second = parse_question(val)
    assert second.question == "Does Casey live in this house ?"
    assert second.rationales[3].endswith("holding an umbrella , and there is a car outside .")
    name = second.image_names[-1]
    store = write_regions(tmp_path / "annotated", {name: 6})
    assert len(read_questions(str(folder / "val.jsonl"), VcrImages(store, None, 100)).items) == 1
    with pytest.raises(BadQuestion):
        VcrImages(store, None, 100).place(first)
