"""Run the short form of the stop campaign; the long one is `python -m tests.campaigns.stops`."""

from tests.campaigns.stops import run


def test_whatever_stops_a_run_its_words_are_true(tmp_path):
    counts = run(rounds=3, seed=1, ranks=2, folder=tmp_path)
    assert counts["SIGINT"] == counts["SIGTERM"] == counts["SIGKILL"] == 1
    assert counts["resumed"] >= 1
    assert counts["steps compared"] > 0
