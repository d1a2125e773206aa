"""Run the short form of the fault campaign; the long one is `python -m tests.campaigns.faults
--kills 200`.
"""

import json
import subprocess
import sys

from tests.launching import ENVIRONMENT, ROOT

COMMAND = (sys.executable, "-m", "tests.campaigns.faults")


def test_kills_and_damage_lose_nothing():
    result = subprocess.run(
        [*COMMAND, "--kills", "4", "--layouts", "1", "--spoil", "0.8", "--quiet"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    counts = json.loads(result.stdout.strip().splitlines()[-1].split("; ", 1)[1])
    assert counts["kills"] >= 4
    assert counts["damage named"] >= 1
    assert counts["steps compared"] > 0
