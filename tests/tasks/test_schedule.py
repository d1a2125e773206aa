"""Test in which order several tasks are trained, against plain loops."""

from collections import Counter
from itertools import pairwise

import pytest

from megatron_interbert.tasks.multitask.schedule import LAG, Pace, Schedule, sampling_weights


def stops(values):
    """Return whether a task has stopped after each of its evaluations."""
    pace = Pace()
    found = []
    for value in values:
        pace.note(value)
        found.append(pace.stopped)
    return found


def test_a_task_stops_without_gain_and_goes_on_once_it_falls():
    assert stops([60, 61, 61.01, 61.02]) == [False, False, False, True]
    assert stops([60, 60, 60, 60, 60]) == [False, False, True, True, True]
    assert stops([60, 60, 60, 59.8, 59.6, 59.6, 59.75, 59.75, 59.75]) == [
        *(False, False, True, True),  # 59.8 is not 0.5 % below 60
        *(False, False, False, False, True),  # 59.6 is
    ]
    assert not any(stops([60, 61, 58, 56, 54, 52, 50])), "a task that falls trains in each round"
    assert stops([60, 60, 60, 62, 62, 62]) == [False, False, True, True, True, True]


def test_rounds_with_tasks_that_have_stopped():
    schedule = Schedule(["a", "b", "c"], 0, stop_and_go=True)
    for step, figures in enumerate([(10, 10, 10), (20, 10, 20), (30, 10, 30)]):
        schedule.note(step, dict(zip("abc", figures, strict=True)))

    order = [schedule.at(step)[0] for step in range(LAG + 40)]
    assert order[: LAG + 2] == [step % 3 for step in range(LAG + 2)], "as if none had stopped"
    rounds = "".join("abc"[number] for number in order[LAG + 2 :]).split("a")
    assert {"bc", "c"} >= set(rounds[1:-1])
    with_b = [place for place, text in enumerate(rounds[1:-1]) if "b" in text]
    assert {later - earlier for earlier, later in pairwise(with_b)} == {4}


def test_earlier_steps_count_a_tasks_own():
    schedule = Schedule(["a", "b"], 7, weights=[3.0, 1.0])
    seen = Counter()
    for step in range(400):
        number, earlier = schedule.at(step)
        assert earlier == seen[number]
        seen[number] += 1

    assert 240 < seen[0] < 360
    again = Schedule(["a", "b"], 7, weights=[3.0, 1.0])
    assert again.at(399) == schedule.at(399), "a resumed run asks for later steps first"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("round-robin", None), ("size", [100, 400]), ("temperature", [10, 20])],
)
def test_weights_of_tasks(schedule, expected):
    assert sampling_weights([100, 400], schedule, 2.0) == expected
