"""Test that each promise in docs/promises.md names tests that exist."""

import re

from tests.launching import ROOT


def test_each_campaign_is_there():
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    campaigns = re.findall(r"`python -m (tests[a-z0-9_.]+)", "\n".join(pages))
    assert len(campaigns) >= 7
    for name in campaigns:
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file(), name


def test_each_promise_names_its_tests():
    lines = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8").splitlines()
    rows = [
        line
        for line in lines
        if line.startswith("|") and not line.startswith(("| Fault |", "|---"))
    ]
    assert len(rows) > 50

    for row in rows:
        named = re.findall(r"`([a-z_/]*test_[a-z0-9_]+\.py)`", row.rpartition(" | ")[2])
        assert named, row
        for name in named:
            assert (ROOT / "tests" / name).is_file(), row
