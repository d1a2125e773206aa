"""Test the table of an evaluation: shares in percent, ranks as they are, published figures."""

from megatron_interbert.tasks.results import table


def test_units_and_published_figures():
    metrics = {"t2i_R@1": 61.94, "t2i_median_rank": 2.0}
    peer = {"model": "InterBERT", "part": "test", "source": "paper", "figures": {"t2i_R@1": 61.9}}
    lines = table({"metrics": metrics, "beside": [peer]}).splitlines()
    assert lines[0].split() == ["ours", "InterBERT"]
    assert lines[1].split() == ["t2i_R@1", "%", "61.94", "61.90"]
    assert lines[2].split() == ["t2i_median_rank", "2.00"]
    assert lines[3] == "InterBERT, test: paper"
