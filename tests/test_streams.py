"""Test standard streams that are closed, full or read by nobody, and odd variables of the
environment: no command fails obscurely because of them.
"""

import os
import sys

import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_bytes, write_output
from megatron_interbert.parallel.launch import read_launch
from tests.launching import ROOT, TINY, launch

CLOSED = {
    "output": ">&-",
    "errors": "2>&-",
    "all": "<&- >&- 2>&-",
    "full": ">/dev/full 2>/dev/full",
}
PRETRAIN = (sys.executable, "-m", "megatron_interbert.pretrain")


def by_shell(redirection, *command):
    """Run a command with streams redirected by a shell; return (exit code, stdout, stderr)."""
    return launch("bash", "-c", f'"$@" {redirection}', "-", *command, warm=False)


@pytest.mark.parametrize("redirection", CLOSED.values(), ids=CLOSED)
def test_a_run_trains_and_saves_without_its_streams(store, tmp_path, redirection):
    save = tmp_path / "run"
    flags = ("--data-path", store, "--save", save, "--train-iters", 2, "--num-workers", 0)
    code, out, err = by_shell(redirection, *PRETRAIN, *TINY, *flags)
    assert code == 0, out + err
    assert (save / "global_step2" / "manifest.json").is_file()


def test_wrong_use_is_said_where_standard_output_is_closed():
    code, out, err = by_shell(">&-", *PRETRAIN, "--lr", -1)
    assert (code, out) == (2, "")
    assert err == "error: --lr -1.0: expected 0 or more\n"


def test_what_could_not_be_printed_is_said(store, tmp_path):
    """Check a full disk; but nothing is reported if the reader has stopped, as `head` does."""
    inspect = (sys.executable, "tools/inspect_features.py", store, "--output", tmp_path / "report")
    code, _, err = by_shell(">/dev/full", *inspect)
    assert code == 1
    assert "note: standard output could not be written (No space left on device)" in err
    assert "Traceback" not in err
    code, _, err = by_shell("| true; exit ${PIPESTATUS[0]}", *inspect)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK is 'abc', expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', expected a number, 1 or more"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0', expected a number, 1 or more"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "2"}, "RANK is '9{40}', expected a number"),
        ({"RANK": "٣", "WORLD_SIZE": "4"}, "RANK is '٣', expected a number"),
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            "RANK is 2 and WORLD_SIZE 2, expected a rank from 0 to 1",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "99999"},
            "MASTER_PORT is",
        ),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is not; start the processes by srun"),
    ],
)
def test_variables_of_launchers_that_make_no_sense(monkeypatch, changes, line):
    monkeypatch.setattr(os, "environ", dict(changes))
    with pytest.raises(UsageError, match=line):
        read_launch()


@pytest.mark.parametrize(
    ("variable", "text"),
    [("PROCESSES_PER_NODE", "abc"), ("PROCESSES_PER_NODE", "0"), ("SLURM_STEP_NUM_NODES", "x")],
)
def test_variables_of_a_node_that_make_no_sense(variable, text):
    command = (sys.executable, "launchers/node.py", "-m", "megatron_interbert.pretrain")
    code, out, err = launch(*command, warm=False, **{variable: text})
    assert (code, out) == (2, "")
    assert (
        err == f"error: {variable} is '{text}', expected a number, 1 or more; see how the job was"
        " started\n"
    )


def test_a_device_that_nobody_knows_is_one_line():
    code, out, err = launch(*PRETRAIN, warm=False, DS_ACCELERATOR="odd")
    assert (code, out) == (2, "")
    assert (
        err
        == "error: DS_ACCELERATOR is 'odd', expected cpu or cuda; unset it to let torch decide\n"
    )


INTERRUPTED_AT_ITS_START = """
import os, signal
from megatron_interbert import pretrain
from megatron_interbert.training import stopping
stopping.end_at_second_interrupt = lambda speaks: os.kill(os.getpid(), signal.SIGINT)
pretrain.main()
"""


def test_ctrl_c_counts_where_there_is_nothing_to_train(store, tmp_path):
    """Check that a script would stop here too, instead of going on after the run."""
    data = ("--data-path", store, "--save", tmp_path / "run")
    flags = (*TINY, *data, "--train-iters", 1, "--num-workers", 0)
    assert launch(*PRETRAIN, *flags)[0] == 0
    code, out, err = launch(sys.executable, "-c", INTERRUPTED_AT_ITS_START, *flags, warm=False)
    assert code == 130, out + err
    assert "already at step 1 of 1: nothing to train" in out
    assert "Traceback" not in err


def test_outputs_go_through_links_and_devices(tmp_path):
    """Check too that a folder is refused, and that only regular files are ever replaced."""
    target = tmp_path / "target"
    link = tmp_path / "link"
    pipe = tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    write_output(link, "new", "--output")
    assert link.is_symlink()
    assert target.read_text() == "new"

    said = (
        "print('first', flush=True); write_output(Path('/dev/stdout'), 'text', '--output');"
        " print('last')"
    )
    imports = "from pathlib import Path; from megatron_interbert.files import write_output"
    whole = (sys.executable, "-c", f"{imports}; {said}")
    assert by_shell(f"> {tmp_path / 'log'}", *whole)[0] == 0
    assert (tmp_path / "log").read_text() == "first\ntextlast\n"

    write_output(tmp_path / "made" / "file", "text", "--output")
    assert (tmp_path / "made" / "file").read_text() == "text"
    with pytest.raises(UsageError, match=r"--output .*: is a folder, expected a file to write"):
        write_output(tmp_path, "text", "--output")

    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=r"--output .*loop: cannot be written \(Too many levels"):
        write_output(tmp_path / "loop", "text", "--output")

    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="is a device, a pipe or a socket and is not overwritten"):
        write_bytes(pipe, b"text")
    if os.geteuid() == 0:
        os.mknod(device := tmp_path / "null", 0o600 | 0o020000, os.makedev(1, 3))
        plan = ("tools/plan.py", "--model", "base", "--gpus", 1, "--output", device)
        code, out, err = launch(sys.executable, *plan, cwd=ROOT)
        assert code == 0, out + err
        assert device.is_char_device()
