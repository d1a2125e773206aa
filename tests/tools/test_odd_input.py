"""Run the short form of a campaign: odd files in place of those that commands take."""

import sys

from tests.launching import launch


def test_odd_input_is_one_line():
    """Run in a process of its own, because it forks and this one has threads."""
    campaign = (
        sys.executable,
        "-m",
        "tests.campaigns.odd_input",
        "--share",
        0.02,
        "--mutations",
        4,
    )
    code, out, err = launch(*campaign, warm=False)
    assert code == 0, out + err
    assert out.rstrip().endswith(" 0 faults")
