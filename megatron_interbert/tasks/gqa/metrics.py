"""Compute GQA's metrics as its official evaluation does, except grounding, which needs attention
over a grid.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.placing import Records

Choices = Mapping[str, tuple[frozenset[str], frozenset[str]]]
COMMON = frozenset({"color", "material", "shape"})  # choices of what two things have in common
BREAKDOWNS: dict[str, Callable[[Record], object]] = {
    "structural": lambda record: record.facts.structural,
    "semantic": lambda record: record.facts.semantic,
    "steps": lambda record: record.facts.steps,
    "words": lambda record: record.facts.words,
}


def check_questions(
    records: Records, choices: Choices | None = None, consistency: bool = False
) -> None:
    """Raise UsageError if the metrics of the questions that have answers cannot be computed: none
    is balanced, one has no entry in `choices` or, for consistency, entails another question.
    """
    known = [records.items[row] for row in records.known()]
    balanced = balanced_of(known)
    if known and not balanced:
        raise UsageError(
            f"{records.files}: none of the questions is balanced, and GQA's metrics are over those"
        )

    for record in balanced if choices is not None else ():
        if not is_common(record) and record.id not in choices:
            raise UsageError(
                f"--choices has no entry for question {record.id}; give that of its split"
            )

    there = {record.id for record in known}
    for record in balanced if consistency else ():
        missing = next((other for other in record.facts.entailed if other not in there), None)
        if missing is not None:
            raise UsageError(
                f"--consistency: question {record.id} entails {missing}, which is not among the"
                " questions with answers; give the files of all questions"
            )


def balanced_of(records: Sequence[Record]) -> list[Record]:
    """Return the balanced ones of questions."""
    return [record for record in records if record.facts.balanced]


def gqa_metrics(
    records: Sequence[Record],
    given: Sequence[str],
    choices: Choices | None = None,
    consistency: bool = False,
) -> dict[str, float]:
    """Return the metrics of the balanced questions: in percent, but the distance of distributions
    (`distribution`, lower is better) as it is.

    Validity and plausibility need `choices`; consistency needs answers to all questions that
    balanced ones entail; see `check_questions`.
    """
    answers = {record.id: answer for record, answer in zip(records, given, strict=True)}
    right = {record.id: answers[record.id] in record.answers for record in records}
    balanced = balanced_of(records)
    is_open = [record for record in balanced if record.facts.structural == "query"]
    binary = [record for record in balanced if record.facts.structural != "query"]
    found = {
        "accuracy": share(right[record.id] for record in balanced),
        "binary": share(right[record.id] for record in binary),
        "open": share(right[record.id] for record in is_open),
        "distribution": distribution(balanced, answers),
    }

    if choices is not None:
        for place, name in enumerate(("validity", "plausibility")):
            found[name] = share(
                answers[record.id] in allowed(record, choices)[place] for record in balanced
            )

    if consistency:
        found["consistency"] = consistency_of(balanced, right)

    for name, kind_of in BREAKDOWNS.items():
        groups: dict[object, list[bool]] = defaultdict(list)
        for record in balanced:
            groups[kind_of(record)].append(right[record.id])
        found |= {
            f"{name}: {kind}": share(some) for kind, some in sorted(groups.items()) if kind != ""
        }

    return found


def share(values: Iterable[bool]) -> float:
    """Return the share of true values in percent; 0 if there are none."""
    listed = list(values)
    return 100.0 * float(np.mean(listed)) if listed else 0.0


def is_common(record: Record) -> bool:
    """Return whether a question asks what two things have in common."""
    return "Common" in record.facts.detailed


def allowed(record: Record, choices: Choices) -> tuple[frozenset[str], frozenset[str]]:
    """Return the valid and the plausible answers to a question."""
    return (COMMON, COMMON) if is_common(record) else choices[record.id]


def consistency_of(balanced: Sequence[Record], right: Mapping[str, bool]) -> float:
    """Return, over the questions answered rightly that entail others, the mean share of these that
    are answered rightly too, in percent.
    """
    shares = [
        np.mean([right[other] for other in record.facts.entailed])
        for record in balanced
        if right[record.id] and record.facts.entailed
    ]

    return 100.0 * float(np.mean(shares)) if shares else 0.0


def distribution(balanced: Sequence[Record], answers: Mapping[str, str]) -> float:
    """Return the distance of the given answers' distribution from the right ones': chi-square over
    each group's right answers, its mean weighted by the groups' questions, divided by 100.
    """
    expected: dict[str, Counter[str]] = defaultdict(Counter)
    observed: dict[str, Counter[str]] = defaultdict(Counter)

    for record in balanced:
        group = record.facts.group
        if group is not None:
            expected[group].update(record.answers)
            observed[group][answers[record.id]] += 1

    total = weighted = 0.0
    for group, wanted in expected.items():
        distance = sum((observed[group][a] - count) ** 2 / count for a, count in wanted.items())
        questions = sum(wanted.values())
        weighted += distance * questions
        total += questions

    return weighted / total / 100.0 if total else 0.0
