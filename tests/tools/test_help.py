"""Every tool starts by itself, from any folder: other tests start them warm, from the project's."""

import subprocess
import sys

import pytest

from tests.launching import ENVIRONMENT, ROOT

TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_a_tool_tells_its_flags(tool, tmp_path):
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, tool, "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"usage: {tool.name}")
