"""Test which device a process takes, on machines simulated by patching torch.cuda."""

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.parallel import device as devices
from tests.launching import ENVIRONMENT, ROOT, free_ports

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2"}
DEEPSPEED = {"CROSS_RANK": "0", "RANK": "1", "WORLD_SIZE": "2"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
OURS = (
    *("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    *TORCHRUN,
    *DEEPSPEED,
    *SRUN,
)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that simulates a machine: the GPUs torch sees, the environment, and
    whether there is a driver. It returns the list of devices that are set.
    """
    chosen = []
    for name in OURS:
        monkeypatch.delenv(name, raising=False)

    def pretend(count, driver=False, cuda="13.0", hip=None, **environment):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        there = tmp_path / "driver"
        there.touch()
        monkeypatch.setattr(devices, "NVIDIA_DRIVER", there if driver else tmp_path / "none")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        return chosen

    return pretend


TAKEN = {
    "no GPU": (0, {}, "cpu"),
    "one GPU": (1, {}, "cuda:0"),
    "two, second rank of torchrun": (
        2,
        {**TORCHRUN, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        "cuda:1",
    ),
    "eight, last rank of deepspeed": (
        8,
        {**DEEPSPEED, "LOCAL_RANK": "7", "LOCAL_SIZE": "8"},
        "cuda:7",
    ),
    "eight, fewer ranks": (8, {**DEEPSPEED, "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, "cuda:1"),
    "hidden by CUDA_VISIBLE_DEVICES": (0, {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
    "one of eight by CUDA_VISIBLE_DEVICES": (1, {"CUDA_VISIBLE_DEVICES": "5"}, "cuda:0"),
    "DS_ACCELERATOR=cpu where there are GPUs": (8, {"DS_ACCELERATOR": "cpu"}, "cpu"),
    "DS_ACCELERATOR=cuda": (1, {"DS_ACCELERATOR": "cuda"}, "cuda:0"),
    "srun --gpus-per-task=1": (1, SRUN, "cuda:0"),
    "srun, all GPUs shown to each task": (4, SRUN, "cuda:3"),
    "srun, DS_ACCELERATOR=cpu": (1, {**SRUN, "DS_ACCELERATOR": "cpu"}, "cpu"),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_device_of_a_process(machine, kind):
    count, environment, expected = TAKEN[kind]
    chosen = machine(count, **environment)
    device = devices.this_device()
    assert str(device) == expected
    assert chosen == ([device] if device.type == "cuda" else []), "torch's current device"


def test_amd_gpus_are_cuda(machine):
    machine(2, cuda=None, hip="7.0")
    assert str(devices.this_device()) == "cuda:0"
    assert devices.unused_gpu_note() == ""


REFUSED = {
    "two processes, one GPU, rank 0": (
        1,
        {**DEEPSPEED, "LOCAL_RANK": "0", "LOCAL_SIZE": "2"},
        "2 processes on",
    ),
    "two processes, one GPU, rank 1": (
        1,
        {**TORCHRUN, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        "torch sees 1 GPU there; start 1",
    ),
    "nine processes, eight GPUs": (
        8,
        {**DEEPSPEED, "LOCAL_RANK": "3", "LOCAL_SIZE": "9"},
        "9 processes on",
    ),
    "srun with more tasks than GPUs": (2, SRUN, "4 processes on"),
    "DS_ACCELERATOR=cuda without a GPU": (
        0,
        {"DS_ACCELERATOR": "cuda"},
        "DS_ACCELERATOR is cuda, but torch",
    ),
    "a device that we do not know": (0, {"DS_ACCELERATOR": "npu"}, "expected cpu or cuda"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_the_numbers(machine, kind):
    count, environment, message = REFUSED[kind]
    chosen = machine(count, **environment)
    with pytest.raises(UsageError, match=message):
        devices.this_device()
    assert chosen == []


def test_an_idle_gpu_is_said(machine, monkeypatch):
    machine(0, driver=True, cuda=None)
    assert "this torch is a CPU build" in devices.unused_gpu_note()
    machine(0, driver=True, cuda="13.0")
    assert "does not support CUDA 13.0" in devices.unused_gpu_note()
    machine(0, driver=False)
    assert devices.unused_gpu_note() == ""
    machine(0, driver=True, CUDA_VISIBLE_DEVICES="")
    assert devices.unused_gpu_note() == "", "hidden on purpose"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    machine(0, driver=True, DS_ACCELERATOR="cpu")
    assert devices.unused_gpu_note() == "", "asked for"


REAL_START = """
import json, torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
calls = []
CPU_Accelerator.set_device = lambda self, number: calls.append(number)
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.engine import Engine
from megatron_interbert.machines.processes import start_processes
config = RunConfig()
device = start_processes()
Engine(torch.nn.Linear(4, 4).to(device), config, ParallelState())
print(json.dumps(calls))
"""


def test_deepspeed_sets_the_device_that_we_have_chosen():
    """Check local rank 3, which sees one device: DeepSpeed by itself would use LOCAL_RANK as the
    device's number.
    """
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3", "SLURM_LOCALID": "3"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    result = subprocess.run(
        [sys.executable, "-c", REAL_START],
        env={**os.environ, **ENVIRONMENT, **place, **meeting},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout.splitlines()[-1])) == {0}


def test_deepspeed_takes_an_empty_variable_for_an_unset_one():
    program = (
        "import megatron_interbert; from deepspeed.accelerator import get_accelerator;"
        " print(get_accelerator().device_name())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "DS_ACCELERATOR": "", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "cpu"
