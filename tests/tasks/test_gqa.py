"""Test GQA: real questions, metrics by brute force, what metrics cannot do without."""

import random
from dataclasses import replace

import numpy as np
import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.gqa import samples as gqa_samples
from megatron_interbert.tasks.gqa.job import submission as gqa_submission
from megatron_interbert.tasks.gqa.metrics import check_questions, gqa_metrics
from megatron_interbert.tasks.gqa.samples import GqaFacts, read_choices, steps_of
from megatron_interbert.tasks.placing import Records
from tests.shared import SHARED, needs_shared
from tests.tasks.test_vcr import write_regions

REAL = SHARED / "data" / "tasks"


@needs_shared
def test_real_questions_of_gqa(tmp_path):
    corpus = write_regions(tmp_path / "s", {"n578564": 3, "n166008": 4})
    paths = [str(REAL / "gqa" / f"questions{n}.json") for n in (0, 1)]
    records = gqa_samples.read_questions(paths, corpus)
    assert [record.id for record in records.items] == ["202218649", "20240871"]
    one, other = (record.facts for record in records.items)
    assert (one.structural, one.balanced, one.entailed) == ("query", True, ("202218648",))
    assert (other.structural, other.detailed, other.balanced) == ("logical", "verifyAttrs", False)
    assert (one.steps, other.steps) == (2, 5)
    assert (one.words, one.group) == (6, "thing")
    assert len(gqa_samples.read_questions(paths, corpus, balanced=True)) == 1
    assert gqa_submission(records.items, ["t-shirt", "yes"]) == (
        '[{"questionId": "202218649", "prediction": "t-shirt"},'
        ' {"questionId": "20240871", "prediction": "yes"}]'
    )


def test_steps_of_a_question_leave_out_what_only_names_or_checks():
    operations = [
        {"operation": "select", "argument": "cup (1)"},
        {"operation": "exist", "argument": "?"},
        {"operation": "query", "argument": "name"},
        {"operation": "choose name", "argument": "a|b"},
        {"operation": "query", "argument": "color"},
    ]
    assert steps_of(operations) == 2


def random_questions(draw, count):
    """Make random questions of GQA with the facts that metrics need."""
    answers = ["yes", "no", "red", "blue", "cup"]
    records = []
    for number in range(count):
        facts = GqaFacts(
            draw.choice(["query", "verify", "logical"]),
            draw.choice(["attr", "obj"]),
            draw.choice(["color", "twoCommon"]),
            draw.randint(1, 4),
            draw.randint(3, 6),
            draw.choice([None, "g", "h"]),
            tuple(str(other) for other in draw.sample(range(count), draw.randint(0, 3))),
            draw.random() < 0.7,
        )
        facts = replace(facts, entailed=tuple(o for o in facts.entailed if o != str(number)))
        records.append(Record(str(number), ("?",), ("i",), {draw.choice(answers): 1.0}, facts))

    return records, draw.choices(answers, k=count)


def test_metrics_of_gqa_by_brute_force():
    draw = random.Random(3)
    for _ in range(20):
        records, given = random_questions(draw, 40)
        choices = {
            record.id: (
                frozenset(draw.sample(["yes", "no", "red", "blue"], 2)),
                frozenset(draw.sample(["yes", "no", "color"], 1)),
            )
            for record in records
        }
        metrics = gqa_metrics(records, given, choices, consistency=True)
        gold = {record.id: next(iter(record.answers)) for record in records}
        said = {record.id: answer for record, answer in zip(records, given, strict=True)}
        chosen = [record for record in records if record.facts.balanced]

        def mean(values):
            return 100 * sum(values) / len(values) if values else 0.0

        hits = {record.id: float(said[record.id] == gold[record.id]) for record in records}
        assert metrics["accuracy"] == pytest.approx(mean([hits[r.id] for r in chosen]))
        for name, is_open in (("open", True), ("binary", False)):
            some = [hits[r.id] for r in chosen if (r.facts.structural == "query") == is_open]
            assert metrics[name] == pytest.approx(mean(some))

        for place, name in enumerate(("validity", "plausibility")):
            some = []
            for record in chosen:
                group = choices[record.id][place]
                if "Common" in record.facts.detailed:
                    group = {"color", "material", "shape"}
                some.append(float(said[record.id] in group))
            assert metrics[name] == pytest.approx(mean(some))

        inferred = []
        for record in chosen:
            if hits[record.id] and record.facts.entailed:
                parts = [hits[other] for other in record.facts.entailed]
                inferred.append(sum(parts) / len(parts))
        assert metrics["consistency"] == pytest.approx(mean(inferred))

        total = weighted = 0
        for group in ("g", "h"):
            members = [record.id for record in chosen if record.facts.group == group]
            score = 0
            for answer in {gold[name] for name in members}:
                expected = sum(gold[name] == answer for name in members)
                observed = sum(said[name] == answer for name in members)
                score += (observed - expected) ** 2 / expected
            weighted += score * len(members)
            total += len(members)
        assert metrics["distribution"] == pytest.approx(weighted / total / 100)

        steps = [hits[r.id] for r in chosen if r.facts.steps == 2]
        assert metrics["steps: 2"] == pytest.approx(mean(steps))


def test_what_metrics_of_gqa_cannot_do_without(tmp_path):
    records, given = random_questions(random.Random(4), 5)
    facts = replace(records[0].facts, entailed=("99",), balanced=True, detailed="color")
    lonely = [Record("0", ("?",), ("i",), {given[0]: 1.0}, facts)]
    with pytest.raises(UsageError, match="question 0 entails 99, which is not among"):
        check_questions(Records("f", lonely, np.zeros((1, 1), int)), consistency=True)
    with pytest.raises(UsageError, match="--choices has no entry for question 0"):
        check_questions(Records("f", lonely, np.zeros((1, 1), int)), {})
    unanswered = Record("99", ("?",), ("i",), {}, replace(facts, entailed=()))
    both = Records("f", [*lonely, unanswered], np.zeros((2, 1), int))
    with pytest.raises(UsageError, match="99, which is not among the questions with answers"):
        check_questions(both, consistency=True)
    check_questions(Records("f", [unanswered], np.zeros((1, 1), int)), {}, consistency=True)
    unbalanced = [Record("0", ("?",), ("i",), {"a": 1.0}, replace(facts, balanced=False))]
    with pytest.raises(UsageError, match="none of the questions is balanced"):
        check_questions(Records("f", unbalanced, np.zeros((1, 1), int)))

    path = tmp_path / "choices.json"
    path.write_text('{"1": {"valid": ["a"]}}')
    with pytest.raises(UsageError, match="question 1 has no 'plausible'"):
        read_choices(str(path))
