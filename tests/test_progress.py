"""Test progress in a log: whole lines, with the remaining time; none for short work or on other
ranks.
"""

import time

import pytest

from megatron_interbert import progress


def test_a_log_gets_lines_and_the_last_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with progress.progress(total=4, unit="shard", desc="building") as bar:
        bar.update(3)
        bar.set_postfix(dropped=2, refresh=False)
        bar.update(1)

    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("building: 4/4 (100 %) | ")
    assert lines[-1].endswith(", dropped=2 | eta 00:00")
    assert any(line.startswith("building: 3/4 (75 %)") for line in lines)
    assert all(lines)
    assert "\r" not in "".join(lines)


def test_unknown_lengths_have_lines_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    assert list(progress.progress(iter("ab"), desc="reading")) == ["a", "b"]
    assert capsys.readouterr().err.splitlines()[-1].startswith("reading: 2/? ")


@pytest.mark.parametrize(("seconds", "shown"), [(30.0, True), (0.0, False)])
def test_short_work_and_other_ranks_are_silent(
    seconds: float, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", seconds)
    assert list(progress.progress([1, 2], shown=shown, desc="reading")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_lines_are_true_when_the_pace_falls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    done = 0
    for done in progress.progress(range(1, 301), desc="reading"):
        time.sleep(0 if done < 200 else 0.004)

    shown = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().err.splitlines()]
    assert shown == sorted(set(shown))
    assert len(shown) >= 5
    assert shown[-1] == done


def test_counts_past_the_end_and_other_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check a count above the total, as ranks with unequal shares report, and other output."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)

    with progress.progress(total=401, desc="searching") as bar:
        bar.update(401)
        bar.update(1)
        bar.write("by the way")

    written = capsys.readouterr()
    assert [line.split(" | ")[0] for line in written.err.splitlines()][
        -1
    ] == "searching: 401/401 (100 %)"
    assert written.err.count("401/401") == 2  # from the two updates, none at the end
    assert written.out == "by the way\n"
