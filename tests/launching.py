"""Starting the program as users do, in processes of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    ENVIRONMENT.pop(name, None)


def start(*command, **changes):
    """A running process with its output captured, in a session of its own so that it can be killed whole."""
    return subprocess.Popen(
        [str(c) for c in command],
        cwd=ROOT,
        env={**ENVIRONMENT, **changes},
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def launch(*command, timeout=300, **changes):
    """Run to the end; (exit code, stdout, stderr)."""
    process = start(*command, **changes)
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def pretrain(*flags):
    """Command line of one plain process."""
    return (sys.executable, "-m", "megatron_interbert.pretrain", *flags)


def deepspeed(processes, *flags):
    """Command line of the DeepSpeed launcher, with a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ("deepspeed", "--num_gpus", processes, "--master_port", port, "launchers/pretrain.sh", *flags)


def records(folder, split="train"):
    """Records of metrics.jsonl by step."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if r["split"] == split}


def losses(folder):
    """The exact figures that a resumed run must repeat, by step."""
    names = ("msm_loss", "mrm_loss", "itm_loss", "grad_norm", "learning_rate", "consumed_samples")
    return {step: tuple(r[n] for n in names) for step, r in records(folder).items()}
