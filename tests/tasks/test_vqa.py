"""Test VQA: the official normalisation and accuracy, answer lists, real questions, minval."""

import json
import random
import re
from collections import Counter

import numpy as np
import pytest

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.answering.vocabulary import read_answers
from megatron_interbert.tasks.vgqa.samples import read_questions as read_visual_genome
from megatron_interbert.tasks.vqa.answers import (
    normalise_answer,
    official_accuracy,
    soft_scores,
)
from megatron_interbert.tasks.vqa.contractions import contractions
from megatron_interbert.tasks.vqa.job import vqa_metrics
from megatron_interbert.tasks.vqa.samples import (
    VqaFacts,
    main_answers,
    read_annotations,
    read_questions,
)
from tests.shared import SHARED, needs_shared
from tests.tasks.test_vcr import write_regions

REAL = SHARED / "data" / "tasks"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red-and-white Hat.", "red and white hat"),
        ("10,000-20,000", "1000020000"),
        ("a/b, c", "b c"),
        ("None", "0"),
        ("T-shirt , jeans", "t shirt jeans"),
        ("2.5 feet", "2.5 feet"),
        ("Im", "im"),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),
        (" Ten\tmen\n", "10 men"),
        ("the an a", ""),
        ("...", ""),
        ("." * 40, "." * 8),
        ("what?!", "what"),
        ("1,2 a;b", "12 ab"),
    ],
)
def test_probes_of_the_normalisation(text, expected):
    assert normalise_answer(text) == expected


def by_the_rules(text):
    """Normalise by the steps of the official evaluation as its description gives them."""
    text = re.sub(r"[\n\t]", " ", text).strip()
    original = text
    for mark in [*';/[]"{}()=+\\_-><@`,?!']:
        delete = re.search(r"\d,\d", original) or re.search(
            rf" {re.escape(mark)}|{re.escape(mark)} ", original
        )
        text = text.replace(mark, "" if delete else " ")

    for _ in range(32):
        text = re.sub(r"\.(?!\d)", "", text, count=1)

    table = contractions()
    words = []
    for word in text.lower().split():
        if word in ("none", "zero"):
            word = "0"
        elif word in (
            names := ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        ):
            word = str(names.index(word) + 1)
        if word not in ("a", "an", "the"):
            words.append(word)

    return " ".join(table.get(word, word) for word in words)


def test_random_answers_are_normalised_by_the_rules():
    draw = random.Random(0)
    pieces = [
        *"abcz019 .,;:/-_'\"()[]{}?!<>@`=+\\\n\t",
        "the",
        "An",
        "none",
        "Two",
        "dont",
        " ",
        ",",
    ]
    for _ in range(4000):
        text = "".join(draw.choices(pieces, k=draw.randint(0, 14)))
        assert normalise_answer(text) == by_the_rules(text), repr(text)


def test_accuracy_leaves_each_person_out_in_turn():
    draw = random.Random(1)
    given = ["yes", "Yes", "no", "2", "two", "a cat", "cat", "t-shirt"]
    for _ in range(2000):
        said = draw.choices(given[: draw.randint(1, 8)], k=draw.choice([1, 3, 10, 10, 10]))
        ours = draw.choice(given)
        compared, answer = list(said), ours
        if len(set(said)) > 1:
            compared, answer = [by_the_rules(text) for text in said], by_the_rules(ours)

        scores = []
        for person in range(len(said)):
            others = compared[:person] + compared[person + 1 :]
            scores.append(min(1, others.count(answer) / 3))

        assert official_accuracy(ours, said) == pytest.approx(sum(scores) / len(scores)), said


def test_scores_to_train_to_are_the_accuracies():
    assert soft_scores(["Cat"] * 1 + ["a cat"] + ["dog"] * 3 + ["cow"] * 5) == {
        "cat": pytest.approx(0.6),
        "dog": pytest.approx(0.9),
        "cow": 1.0,
    }
    mixed = ["cat"] * 4 + ["dog"] * 6
    for answer, score in soft_scores(mixed).items():
        assert score == pytest.approx(official_accuracy(answer, mixed))


def test_accuracies_by_type_are_means_of_their_questions():
    draw = random.Random(2)
    answers = ["yes", "no", "2", "red"]
    records = []
    for number in range(300):
        said = tuple(draw.choices(answers, k=10))
        facts = VqaFacts(
            said, draw.choice(["is the", "how many"]), draw.choice(["yes/no", "other"])
        )
        records.append(Record(str(number), ("?",), ("i",), soft_scores(said), facts))

    given = draw.choices(answers, k=len(records))
    metrics = vqa_metrics(records, given)
    for name, chosen in {
        "accuracy": lambda facts: True,
        "answer_type: other": lambda facts: facts.answer_type == "other",
        "question_type: how many": lambda facts: facts.question_type == "how many",
    }.items():
        values = [
            official_accuracy(answer, record.facts.said)
            for record, answer in zip(records, given, strict=True)
            if chosen(record.facts)
        ]
        assert metrics[name] == pytest.approx(100 * np.mean(values))


@needs_shared
def test_the_fields_answer_lists_are_fixed_points_of_the_normalisation():
    lists = [
        read_answers(str(REAL / "vqav2" / name), "--answers")
        for name in (
            "uniter_ans2label.json",
            "lxmert_trainval_ans2label.json",
            "lxmert_trainval_label2ans.json",
        )
    ]
    assert [len(some) for some in lists] == [3129] * 3
    assert set(lists[0].answers) == set(lists[1].answers) == set(lists[2].answers)
    assert lists[1].answers == lists[2].answers != lists[0].answers
    assert all(normalise_answer(answer) == answer for answer in lists[0].answers)
    gqa = read_answers(str(REAL / "gqa" / "lxmert_trainval_label2ans.json"), "--answers")
    assert len(gqa) == 1842
    assert any(normalise_answer(answer) != answer for answer in gqa.answers), "t-shirt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 0, "b": 2}, "the number of 'b' is 2, expected 0 to 1"),
        ({"a": 0, "b": 0}, "'a' and 'b' have the same number 0"),
        ({"a": "0"}, "the number of 'a' is '0'"),
        (["a", "b", "a"], "'a' occurs twice"),
        (["a", 1], "expected a list of answers"),
        ([], "holds no answers"),
        (3, "expected a list of answers"),
    ],
)
def test_answer_lists_that_are_none(tmp_path, content, message):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        read_answers(str(path), "--answers")


@needs_shared
def test_real_questions_find_images_by_cocos_names(tmp_path):
    questions = json.loads((REAL / "vqav2" / "questions.json").read_text())["questions"]
    names = [f"COCO_train2014_{q['image_id']:012d}" for q in questions]
    corpus = write_regions(tmp_path / "store", dict.fromkeys(names, 3))
    files = [str(REAL / "vqav2" / f"{name}.json") for name in ("questions", "annotations")]
    records = read_questions(files[:1], read_annotations(files[1:]), corpus)
    assert len(records) == 3
    assert not len(records.drops)
    assert [len(record.facts.said) for record in records.items] == [10, 10, 10]
    assert max(records.items[0].answers.values()) == 1.0
    main = main_answers([read_annotations(files[1:])])
    assert main.total() == 3
    for record in records.items:
        said = Counter(normalise_answer(answer) for answer in record.facts.said)
        assert main[said.most_common(1)[0][0]]

    plain = write_regions(tmp_path / "plain", {f"{q['image_id']:012d}": 3 for q in questions})
    assert len(read_questions(files[:1], read_annotations(files[1:]), plain)) == 3
    val = write_regions(
        tmp_path / "val", {f"COCO_val2014_{q['image_id']:012d}": 3 for q in questions}
    )
    with pytest.raises(UsageError, match="dropped 3: its image is not in the region store"):
        read_questions(files[:1], read_annotations(files[1:]), val)


@needs_shared
def test_real_questions_of_visual_genome(tmp_path):
    corpus = write_regions(tmp_path / "store", {"4": 3, "5": 4})
    path = [str(REAL / "vgqa" / "question_answers.json")]
    records = read_visual_genome(path, "train", 0, corpus)
    assert len(records) == 8
    assert list(records.items[0].answers) == ["sailboats"]
    assert len(read_visual_genome(path, "train", 1, corpus)) == 5
    assert len(read_visual_genome(path, "valid", 1, corpus)) == 3
    with pytest.raises(UsageError, match="--minval 2: there are 2 images"):
        read_visual_genome(path, "valid", 2, corpus)


def files_of(tmp_path, entries, annotations, **head):
    questions = tmp_path / "q.json"
    answers = tmp_path / "a.json"
    head = {"data_type": "mscoco", "data_subtype": "train2014", **head}
    questions.write_text(json.dumps({**head, "questions": entries}))
    answers.write_text(json.dumps({"annotations": annotations}))
    return [str(questions)], [str(answers)]


def test_questions_that_cannot_be_used_are_counted(tmp_path):
    corpus = Corpus([str(write_regions(tmp_path / "s", {"7": 3}).stores[0].path)])
    entries = [
        {"question_id": 1, "image_id": 7, "question": "what?"},
        {"question_id": 2, "image_id": 8, "question": "what?"},
        {"question_id": 3, "image_id": 7, "question": "  "},
        {"question_id": 4, "image_id": 7, "question": "what?"},
        {"question_id": 5, "image_id": 7, "question": "what?"},
    ]
    answered = [
        {"question_id": n, "answers": [{"answer": "yes"}] * 10 if n != 5 else []}
        for n in (1, 2, 3, 5)
    ]
    questions, annotations = files_of(tmp_path, entries, answered)
    records = read_questions(questions, read_annotations(annotations), corpus)
    assert [record.id for record in records.items] == ["1"]
    assert dict(records.drops.counts) == {
        "its image is not in the region store": 1,
        "the question has no text": 1,
        "no annotation answers it": 1,
        "its annotation has no answers": 1,
    }
    with pytest.raises(UsageError, match="2: its image is not in the region store; every sample"):
        read_questions(questions, None, corpus, whole=True)

    for change, message in (
        ({"question": 3}, "question 0: 'question' is 3, expected str"),
        ({"question_id": "a1"}, "question 0: 'question_id' is \"a1\", expected a whole number"),
    ):
        bad = files_of(tmp_path, [{**entries[0], **change}], answered)
        with pytest.raises(UsageError, match=message):
            read_questions(bad[0], read_annotations(bad[1]), corpus)

    texts = files_of(
        tmp_path,
        [{**entries[0], "question_id": "1"}],
        [{**answered[0], "question_id": "1"}],
    )
    assert len(read_questions(texts[0], read_annotations(texts[1]), corpus)) == 1

    twice = files_of(tmp_path, [entries[0], entries[0]], answered)
    with pytest.raises(UsageError, match="1 occurs twice"):
        read_questions(twice[0], read_annotations(twice[1]), corpus)
    with pytest.raises(UsageError, match="has no list 'questions'"):
        read_questions(annotations, read_annotations(annotations), corpus)
