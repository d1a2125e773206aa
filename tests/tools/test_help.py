"""Test that every tool starts from any folder, cold, and that every command tells its flags."""

import subprocess
import sys

import pytest

from megatron_interbert.__main__ import COMMANDS
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


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_tells_its_flags(name):
    code, out, err = launch(sys.executable, "-m", "megatron_interbert", name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: interbert {name} " if name != "launch" else "Start the ranks")


@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_a_task_tells_its_flags_under_its_name(command):
    code, out, _ = launch(sys.executable, "-m", "megatron_interbert", command, "glue", "--help")
    assert code == 0
    assert out.startswith(f"usage: interbert {command} glue [FLAGS]")


def test_the_service_names_the_package_that_it_lacks(tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(name='uvicorn')")
    code, out, err = launch(
        *(sys.executable, "-m", "megatron_interbert", "serve", "--load", "run"),
        warm=False,
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    assert (code, out) == (2, "")
    assert err == "error: the service needs uvicorn: pip install 'megatron_interbert[serve]'\n"


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_an_unknown_flag_is_one_line(tool):
    code, out, err = launch(sys.executable, f"tools/{tool.name}", "--no-such-flag")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
