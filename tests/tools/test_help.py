"""Test that every tool starts from any folder, cold; other tests start them warm, from the root."""

import subprocess
import sys

import pytest

from tests.launching import ENVIRONMENT, ROOT, launch

TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text())


def ended(tool, flag, folder):
    """Start a tool cold in a folder; return the ended process."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, tool, flag],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_a_tool_tells_its_flags(tool, tmp_path):
    told = ended(tool, "--help", tmp_path)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith(f"usage: {tool.name}")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_an_unknown_flag_is_one_line(tool):
    code, out, err = launch(sys.executable, f"tools/{tool.name}", "--no-such-flag")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
