"""Test that all launchers train alike, and that bad input gives one clear line, exit code 2, and
nothing half-written.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.launch import arguments_of
from tests.launching import (
    ENVIRONMENT,
    ROOT,
    TINY,
    deepspeed,
    launch,
    losses,
    pretrain,
    start,
    train,
    until,
)
from tests.preparation.hostile import renew

FLAGS = (*TINY, "--train-iters", 3, "--num-workers", 1)


def test_every_way_in_gives_the_same_losses(store, tmp_path):
    def flags(name):
        return ("--data-path", store, "--save", tmp_path / name, *FLAGS)

    ways = {
        "python": pretrain(*flags("python")),
        "deepspeed": ("deepspeed", "--num_gpus", 1, "launchers/pretrain.sh", *flags("deepspeed")),
        "bash": ("bash", "launchers/pretrain.sh", *flags("bash")),
        "executable": (ROOT / "launchers" / "pretrain.sh", *flags("executable")),
        "torchrun": (
            "torchrun",
            "--nproc-per-node",
            1,
            "-m",
            "megatron_interbert.pretrain",
            *flags("torchrun"),
        ),
        "spawned loader": pretrain(*flags("spawned loader"), "--worker-start", "spawn"),
    }
    for name, command in ways.items():
        code, out, err = launch(*command, warm=False, LAUNCH_ARGS="--num_gpus 1")
        assert code == 0, f"{name}: {out}{err}"
        assert "on each node:" not in out, "that line is for several nodes"

    results = {name: losses(tmp_path / name) for name in ways}
    assert sorted(results["python"]) == [1, 2, 3]
    for name, result in results.items():
        assert result == results["python"], name


def damaged(store, folder, change, shard="shard-00000.h5", renewed=False):
    copy = shutil.copytree(store, folder)
    with h5py.File(copy / shard, "r+") as file:
        change(file)
    if renewed:  # as if it had been built like that, with correct hashes
        renew(copy)
    return copy


def expect_refusal(message, command):
    code, out, err = launch(*command)
    assert code == 2, f"{code}: {out}{err}"
    line = next(line for line in reversed(err.strip().splitlines()) if line.startswith("error:"))
    assert message in line, line
    assert "Traceback" not in err


def test_a_bad_record_ends_the_run_with_its_name(store, tmp_path):
    """Check on two ranks: the one that reads it names it, and both end."""
    bad = damaged(
        store,
        tmp_path / "store",
        lambda f: f["image_features"].__setitem__(slice(None), np.nan),
        renewed=True,
    )
    code, out, err = launch(*deepspeed(2, "--data-path", bad, "--save", tmp_path / "run", *FLAGS))
    assert code == 2, out + err
    assert "shard-00000.h5: image" in err
    assert "features hold NaN or infinity" in err
    assert not list((tmp_path / "run").glob("global_step*"))


def test_a_machine_shares_its_cores_among_its_ranks(store):
    """Check the number of threads: torchrun alone would give each of several ranks one."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"}
    code = (
        "import os; os.sched_getaffinity = lambda pid: set(range(16)); import runpy, sys;"
        "from megatron_interbert.launch import command; command(['script']);"
        "print(os.environ['OMP_NUM_THREADS'])"
    )

    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PROCESSES_PER_NODE": "2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.split() == ["8"], result.stderr


BAD_FLAGS = {
    "no store": (("--data-path", "/nowhere"), "no manifest.json there"),
    "unknown flag": (("--micro-bach-size", "4"), "did you mean '--micro-batch-size'"),
    "tensor parallel and processes": (
        ("--tensor-model-parallel-size", "3"),
        "does not divide the number of processes, 1",
    ),
    "batch": (("--global-batch-size", "7"), "not a multiple of --micro-batch-size 4"),
    "partitions": (
        ("--data-partitions", "1024"),
        "--data-partitions 1024 is more than the 80 captions",
    ),
    "vocabulary and model": (("--model", "base"), "vocab_size is 27, but the model has 30522"),
    "positions": (
        ("--max-tokens", "100"),
        "--max-tokens 100 is more than the model's 64 positions",
    ),
    "apex": (("--kernels", "apex"), "NVIDIA apex is not installed"),
    "init": (("--init-from", "/nowhere"), "--init-from /nowhere: no such file"),
}


@pytest.mark.parametrize("kind", BAD_FLAGS)
def test_wrong_use(store, tmp_path, kind):
    flags, message = BAD_FLAGS[kind]
    expect_refusal(
        message, pretrain("--data-path", store, "--save", tmp_path / "run", *FLAGS, *flags)
    )
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_wrong_use_on_two_ranks_is_said_once(store, tmp_path):
    """Check heads that two ranks cannot share, partitions that two ranks do not divide, and a model
    for another vocabulary, which both ranks find: rank 1 does not report that rank 0 ended for it.
    """
    sizes = {
        "hidden_size": 33,
        "num_attention_heads": 3,
        "image_attention_heads": 3,
        "vocab_size": 0,
        "feature_dim": 0,
        "num_classes": 0,
    }
    (tmp_path / "m.json").write_text(json.dumps(sizes))
    flags = ("--data-path", store, *FLAGS)
    code, _, err = launch(
        *deepspeed(2, *flags, "--model", tmp_path / "m.json", "--tensor-model-parallel-size", 2)
    )
    assert code == 2
    assert err.count("--tensor-model-parallel-size 2 does not divide num_attention_heads 3") == 1
    for wrong, message in {
        ("--data-partitions", 7): "data-parallel size 2 does not divide --data-partitions 7",
        ("--model", "base"): "vocab_size is 27, but the model has 30522",
    }.items():
        code, _, err = train(2, *flags, *wrong)
        assert code == 2
        assert err.count(message) == 1
        assert "has ended with code" not in err


def test_preflight_says_what_is_wrong_and_how_to_mend_it(store, tmp_path):
    command = (sys.executable, "-m", "megatron_interbert.preflight", "--data-path", store, *FLAGS)
    code, out, err = launch(*command, "--bf16", "--fp8")
    assert code == 0, out + err
    assert out.count("ok  ") == 5
    bad = damaged(
        store, tmp_path / "store", lambda f: f["image_features"].__setitem__((0, 0), np.nan)
    )
    code, out, err = launch(*command, "--data-path", bad, "--world-size", 3)
    assert code == 2
    assert "FAILED  batch" in out
    assert "sha256 differs" in out
    assert "preflight: batch, data" in err


def test_preflight_looks_at_what_would_be_resumed(store, tmp_path):
    run = tmp_path / "run"
    code, out, err = train(1, "--data-path", store, *FLAGS, "--train-iters", 1, "--save", run)
    assert code == 0, out + err

    command = (sys.executable, "-m", "megatron_interbert.preflight", "--data-path", store, *FLAGS)
    code, out, err = launch(*command, "--fast", "--save", run)
    assert code == 0, out + err
    assert f"resumes from {run}/global_step1; " in out

    code, out, err = launch(*command, "--fast", "--save", run, "--model", "sample")
    assert code == 2
    assert f"{run}/global_step1: made with other model sizes (" in out


def test_launch_takes_commands_and_what_torchrun_takes(tmp_path, monkeypatch):
    script = tmp_path / "train"
    script.write_text("")
    ours = ["-m", "megatron_interbert.pretrain", "--lr", "1"]
    assert arguments_of(["pretrain", "--lr", "1"]) == ours
    for words in (["-m", "theirs.train"], ["--module", "theirs.train"], [str(script), "--lr", "1"]):
        assert arguments_of(words) == words

    monkeypatch.setenv("PROCESSES_PER_NODE", "")
    for words in (["--processes", "2"], ["--processes=2"]):
        assert arguments_of([*words, "pretrain", "--lr", "1"]) == ours
        assert os.environ.pop("PROCESSES_PER_NODE") == "2"

    for words, told in (
        ([], "a command is missing; expected one of pretrain, "),
        (["pretrian"], r"no command or script 'pretrian' \(did you mean 'pretrain'"),
        ([str(tmp_path / "nowhere.py")], "no command or script '.*nowhere"),
        (["--processes", "0", "pretrain"], "--processes is '0', expected 1 or more"),
        (["--processes"], "--processes is '', expected 1 or more"),
    ):
        with pytest.raises(UsageError, match=told):
            arguments_of(words)


COMMANDS = [
    ("-m", f"megatron_interbert.{name}")
    for name in ("pretrain", "finetune", "evaluate", "serve", "preflight")
]
COMMANDS += [(str(ROOT / "launchers" / "pretrain.sh"),), (str(ROOT / "tools" / "plan.py"),)]
COMMANDS += [("-m", "megatron_interbert", "evaluate")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: Path(words[-1]).name)
def test_ctrl_c_during_the_imports_is_no_traceback(command, tmp_path):
    """Interrupt the import of torch, which takes seconds on a cold disk, when users change their
    minds.
    """
    (tmp_path / "torch").mkdir()
    interrupted = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "torch" / "__init__.py").write_text(interrupted)
    path = f"{tmp_path}:{ROOT}"
    code, out, err = launch(
        sys.executable, *command, "--help", warm=False, cwd=tmp_path, timeout=30, PYTHONPATH=path
    )
    assert (code, out, err) == (-signal.SIGINT, "", "")


def test_a_signal_before_a_rank_handles_it_is_no_failure(tmp_path):
    """Check a rank that is still importing, as far as its launcher can tell."""
    script = tmp_path / "slow.py"
    script.write_text("import time\nopen('started', 'w')\ntime.sleep(60)\n")
    launcher = start(sys.executable, "-m", "megatron_interbert.launch", script, cwd=tmp_path)
    until((tmp_path / "started").exists, "the rank has started")
    launcher.send_signal(signal.SIGUSR1)
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, out + err
    assert err == "SIGUSR1: ended; the same command starts again or resumes\n"


def test_the_package_leaves_the_signals_of_a_program_that_imports_it_alone(tmp_path):
    """Check a program, a script and another package, all with an unknown DS_ACCELERATOR."""
    program = (
        "import signal, megatron_interbert;"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text(program)
    (tmp_path / "theirs" / "train.py").write_text("")
    changes = {"DS_ACCELERATOR": "xpu", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    (tmp_path / "interbert_demo.py").write_text(program)
    for command in (("-c", program), ("-m", "theirs.train"), ("interbert_demo.py",)):
        code, out, err = launch(sys.executable, *command, warm=False, cwd=tmp_path, **changes)
        assert code == 0, out + err
