"""Run the short form of the fault-injection campaign; the long one is `python -m
tests.campaigns.injection --faults 500`.
"""

import json
import shutil
import subprocess
import sys

import pytest

from tests.launching import ENVIRONMENT, ROOT


@pytest.mark.skipif(
    shutil.which("cc") is None, reason="needs a C compiler, for the library that injects"
)
def test_no_injected_fault_loses_anything():
    command = [
        sys.executable,
        "-m",
        "tests.campaigns.injection",
        "--faults",
        "8",
        "--seed",
        "1",
        "--quiet",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["faults"] >= 7
    assert sum(met for name, met in counts.items() if "code 1" in name or "code 2" in name) > 2
