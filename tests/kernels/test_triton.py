"""Test without a GPU that the Triton kernels compute what their twins do."""

import os
import subprocess
import sys

import pytest

from tests.launching import ROOT

pytest.importorskip("triton", reason="triton is not installed (pip install -r requirements.txt)")


def test_they_equal_their_twins_in_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/interpreted.py",
    ]

    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout[-5000:]
