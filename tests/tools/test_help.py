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


@pytest.mark.parametrize(
    ("command", "package", "told"),
    [
        (("serve", "--load", "run"), "uvicorn", "the service needs uvicorn: pip install"),
        (("make-shop", "--output", "shop"), "PIL", "make-shop needs PIL: pip install"),
    ],
)
def test_a_package_that_is_missing_is_named(command, package, told, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name='{package}')")
    code, out, err = launch(
        *(sys.executable, "-m", "megatron_interbert", *command),
        warm=False,
        cwd=tmp_path,
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {told} 'megatron_interbert[")
    assert err.count("\n") == 1


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_an_unknown_flag_is_one_line(tool):
    code, out, err = launch(sys.executable, f"tools/{tool.name}", "--no-such-flag")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
