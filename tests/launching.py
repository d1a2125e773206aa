"""Start the program as users do, in processes of its own."""

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.warm import ROOT, WarmProcess

TINY = (
    "--model",
    "tiny",
    "--micro-batch-size",
    4,
    "--data-partitions",
    8,
    "--log-interval",
    1,
    "--lr",
    "1e-3",
)  # for the fixture `store`
ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    ENVIRONMENT.pop(name, None)


def start(*command, warm=True, cwd=ROOT, files=None, **changes):
    """Start a command with captured output, in a session of its own so that it can be killed whole.

    `python -m ..` and `python tools/..` start warm if `warm`, unless a variable of Python itself is
    changed. `files` limits how many descriptors it may open.
    """
    command = [str(word) for word in command]
    environment = {**ENVIRONMENT, **changes}
    ours = command[0] == sys.executable and (command[1] == "-m" or command[1].startswith("tools/"))
    if warm and ours and not any(name.startswith("PYTHON") for name in changes):
        return WarmProcess(command[1:], environment, cwd, files)
    if files:
        command = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "-", *command]

    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _ports_of_this_worker():
    """Yield ports in turn, from a separate block for each pytest worker, below those the kernel
    uses for connections (32,768 and up): a port that is free now is still free when the ranks start
    to listen seconds later.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    block = range(10_000 + 2_000 * (worker % 11), 12_000 + 2_000 * (worker % 11))
    start = random.SystemRandom().randrange(len(block))  # other test runs may share this machine
    yield from itertools.cycle([*block[start:], *block[:start]])


_PORTS = _ports_of_this_worker()


def free_ports(number):
    """Return ports on which nothing listens and that no other test uses."""
    return [next(port for port in _PORTS if _is_free(port)) for _ in range(number)]


def _is_free(port):
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def start_ranks(
    *of_each, module="megatron_interbert.pretrain", port=None, world_size=None, first=0, **changes
):
    """Start ranks by hand, as if each had its own machine: no launcher ends the others.

    `of_each`: flags by rank, from `first` on.
    """
    common = {
        "WORLD_SIZE": str(world_size or len(of_each)),
        "MASTER_ADDR": "127.0.0.1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_PORT": str(port or free_ports(1)[0]),
        **changes,
    }
    command = (sys.executable, "-m", module)

    return [
        start(*command, *flags, **common, RANK=str(rank), SLURMD_NODENAME=f"n{rank}")
        for rank, flags in enumerate(of_each, first)
    ]


def train(processes, *flags, module="megatron_interbert.pretrain", timeout=300):
    """Run ranks of one machine to their end, as a launcher starts them; return (largest exit code,
    stdout, stderr of all).
    """
    common = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    ranks = [
        start(sys.executable, "-m", module, *flags, **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(processes)
    ]
    codes, outs, errs = zip(*ends(ranks, timeout), strict=True)

    return max(codes, key=abs), "".join(outs), "".join(errs)


def ends(processes, timeout=120):
    """Wait for processes to end by themselves; return [(exit code, stdout, stderr)]."""
    results = []
    for process in processes:
        out, err = process.communicate(timeout=timeout)
        results.append((process.returncode, out, err))

    return results


def kill_session(process):
    """Kill a process, if it still runs, and all that it has started (SIGKILL)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def until(condition, what, seconds=90):
    """Wait until `condition()` is true; return its result, or fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)

    return found


def environment(pid):
    """Return the environment a process was started with; empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return {}

    return dict(word.split("=", 1) for word in text.split("\0") if "=" in word)


def launch(*command, timeout=300, **changes):
    """Run a command to its end; return (exit code, stdout, stderr)."""
    process = start(*command, **changes)
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def pretrain(*flags):
    """Return the command line of `pretrain` in a single process."""
    return (sys.executable, "-m", "megatron_interbert.pretrain", *flags)


def finetune(*flags):
    """Return the command line of `finetune` in a single process."""
    return (sys.executable, "-m", "megatron_interbert.finetune", *flags)


def evaluate(*flags):
    """Return the command line of `evaluate` in a single process."""
    return (sys.executable, "-m", "megatron_interbert.evaluate", *flags)


def ran(*command):
    """Run a command, which must succeed; return its stdout."""
    code, out, err = launch(*command)
    assert code == 0, out + err
    return out


def deepspeed(processes, *flags):
    """Return the DeepSpeed launcher's command line for `pretrain`, with a free port."""
    return (
        "deepspeed",
        "--num_gpus",
        processes,
        "--master_port",
        free_ports(1)[0],
        "launchers/pretrain.sh",
        *flags,
    )


def records(folder, split="train"):
    """Read the records of a split in metrics.jsonl, by step."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if r["split"] == split}


def steps(folder):
    """Count the steps that a run has recorded so far."""
    path = Path(folder) / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def losses(folder):
    """Return the metrics that a resumed run must repeat exactly, by step."""
    names = ("msm_loss", "mrm_loss", "itm_loss", "grad_norm", "learning_rate", "consumed_samples")
    return {step: tuple(r[n] for n in names) for step, r in records(folder).items()}
