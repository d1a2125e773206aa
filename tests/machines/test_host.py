"""Test how much memory a process may still take: limits of control groups of both versions, and a
real one.
"""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_interbert.machines.host import free_memory

MIB = 2**20


def group(folder, names, limit, used, cached):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    key = "inactive_file" if names[0] == "memory.max" else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 1\n{key} {cached}\n")


def test_the_tightest_group_counts(tmp_path):
    version_2 = ("memory.max", "memory.current")
    groups = tmp_path / "groups"
    own = tmp_path / "own"
    group(groups / "slurm/job_7", version_2, 900 * MIB, 300 * MIB, 50 * MIB)
    group(groups / "slurm/job_7/step_0/task", version_2, "max", 100 * MIB, 0)
    own.write_text("0::/slurm/job_7/step_0/task\n")
    assert free_memory(own, groups) == 650 * MIB, "the job's limit holds for its tasks"
    group(groups / "slurm/job_7/step_0/task", version_2, 120 * MIB, 100 * MIB, 0)
    assert free_memory(own, groups) == 20 * MIB
    group(groups / "slurm/job_7/step_0/task", version_2, 90 * MIB, 100 * MIB, 0)
    assert free_memory(own, groups) == 0
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(groups / "memory/job", version_1, 500 * MIB, 100 * MIB, 10 * MIB)
    own.write_text("9:name=systemd:/\n4:cpu,cpuacct:/job\n3:memory:/job\n0::/\n")
    assert free_memory(own, groups) == 410 * MIB


def test_without_limits_it_is_what_the_machine_has(tmp_path):
    for text in ("0::/nowhere\n", "3:memory:/\n", ""):
        (tmp_path / "own").write_text(text)
        assert free_memory(tmp_path / "own", tmp_path) == pytest.approx(
            psutil.virtual_memory().available, rel=0.05
        )

    assert free_memory(tmp_path / "none", tmp_path) > 0


def test_a_real_limit():
    """Check the limit of a control group made here, in a process that joins it."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    version_1 = next((path for _, names, path in lines if "memory" in names.split(",")), None)
    parent = Path("/sys/fs/cgroup") / (
        f"memory{version_1}" if version_1 else next(path for *_, path in lines).lstrip("/")
    )
    mine = parent / f"interbert_test_{os.getpid()}"
    limit = "memory.limit_in_bytes" if version_1 else "memory.max"

    try:
        mine.mkdir()
        (mine / limit).write_text(str(700 * MIB))
    except OSError as error:
        pytest.skip(f"needs the right to make control groups for memory ({error})")

    join_and_ask = (
        "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(str(os.getpid()));from"
        " megatron_interbert.machines.host import free_memory; taken = bytearray(100 << 20);"
        " print(free_memory())"
    )
    try:
        out = subprocess.run(
            [sys.executable, "-c", join_and_ask, str(mine / "cgroup.procs")],
            capture_output=True,
            text=True,
        )
    finally:
        mine.rmdir()

    assert out.returncode == 0, out.stderr
    assert 50 * MIB < int(out.stdout) < 600 * MIB, "700 less what torch and the 100 take"
