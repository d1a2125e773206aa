"""Test the table of an evaluation: shares in percent, ranks as they are, official metrics."""

from megatron_interbert.tasks.results import table


def test_units_and_official_figures():
    metrics = {"t2i_R@1": 61.94, "t2i_median_rank": 2.0}
    lines = table({"metrics": metrics, "official": {"t2i_R@1": 61.9}}).splitlines()
    assert lines[0].split() == ["ours", "official"]
    assert lines[1].split() == ["t2i_R@1", "%", "61.94", "61.9"]
    assert lines[2].split() == ["t2i_median_rank", "2.00"]
