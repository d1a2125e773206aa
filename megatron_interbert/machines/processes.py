"""Join the other processes of a run, and fail early and clearly if they cannot meet."""

import contextlib
import hashlib
import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_text
from megatron_interbert.machines.host import keep_freed_memory, use_cores
from megatron_interbert.parallel.agreement import some
from megatron_interbert.parallel.device import (
    check_deepspeed,
    gpu_identity,
    this_device,
    unused_gpu_note,
)
from megatron_interbert.parallel.launch import MEETING_SECONDS, Launch, read_launch
from megatron_interbert.parallel.state import COLLECTIVE_TIMEOUT, ParallelState
from megatron_interbert.signals import identity

START_SECONDS = 300  # for nccl or gloo to connect ranks that have already met
SAY_NOTHING = (
    "OVERFLOW! Skipping step",  # the loop reports it itself
    "Offloading to NVMe can generate heavy write traffic",  # docs/scaling.md says so
    # about inputs without gradients
    "unknown inputs or outputs type (<class 'megatron_interbert.data.packing.PackedBatch'>)",
)


def start_processes() -> torch.device:
    """Join the process group (nccl on GPUs, else gloo) and return the device of this rank.

    Raises UsageError if the ranks do not meet, or do not have a device each.
    """
    quiet_libraries()
    launch = read_launch()
    device = this_device()
    check_deepspeed(device)
    if launch.local_rank == 0 and (note := unused_gpu_note()):
        print(note, flush=True)

    if device.type == "cpu":
        use_cores(launch)
        keep_freed_memory()

    leave_out_shared_memory()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():  # a calling program may have joined already
        join(launch, device, backend)

    deepspeed.init_distributed(dist_backend=backend, verbose=False)  # uses the existing group

    return device


def leave_out_shared_memory() -> None:
    """Keep DeepSpeed from compiling a shared-memory operation for inference when it joins a process
    group: training never calls it, and a run that is killed while compiling leaves a lock on which
    the next one hangs.

    The only place that changes a value of DeepSpeed's.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def join(launch: Launch, device: torch.device, backend: str) -> None:
    """Meet the other ranks and start torch's process group; raises UsageError if that fails."""
    store = rendezvous(launch, gpu_identity(device))
    overdue = threading.Timer(START_SECONDS, give_up, [launch, backend])
    overdue.daemon = True
    overdue.start()

    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"{launch.node}: the process group cannot start ({first_line(error)})"
        ) from error
    finally:
        overdue.cancel()


def give_up(launch: Launch, backend: str) -> None:
    """End this process from a thread, as its main thread waits for ranks that it cannot reach."""
    print(
        f"error (rank {launch.rank} on {launch.node}): {backend} has not connected the"
        f" {launch.world_size} ranks within {START_SECONDS} s; are all ports open between the"
        " machines, and is the network interface the right one (NCCL_SOCKET_IFNAME,"
        " GLOO_SOCKET_IFNAME)?",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def rendezvous(launch: Launch, gpu: str = "", seconds: float = MEETING_SECONDS) -> dist.Store:
    """Return a store that all ranks have reached within `seconds`, each with its `gpu`'s identity.

    Raises UsageError that names missing ranks, the obstacle, or ranks that share a GPU.
    """
    deadline = time.monotonic() + seconds
    hosts = launch.rank == 0 and not launch.hosted_by_agent
    where = f"{launch.master}:{launch.port}"

    try:
        store = host_store(launch, seconds) if hosts else reach_store(launch, deadline)
        where = f"{store.host}:{store.port}"
        os.environ["MASTER_PORT"] = str(store.port)  # for all that read it from now on
        store = dist.PrefixStore(f"start {launch.attempt}", store)
        store.set(f"rank {launch.rank}", f"{launch.node} {gpu}")
    except UsageError:
        raise
    except (RuntimeError, ValueError) as error:
        if hosts:
            raise UsageError(
                f"rank 0 on {launch.node} cannot listen at {where} ({first_line(error)}); if a run"
                " that was killed left processes behind, end them, or choose another port"
                " (deepspeed --master_port N, MASTER_PORT=N)"
            ) from error

        raise UsageError(
            f"rank {launch.rank} on {launch.node} has not reached rank 0 at {where} within"
            f" {seconds:g} s ({first_line(error)}); is rank 0 running, is that the right address,"
            " and is the port open between the machines?"
        ) from error

    missing = [rank for rank in range(launch.world_size) if not _came(store, rank, deadline)]
    if hosts:
        port_note().unlink(missing_ok=True)
    if missing:
        raise UsageError(
            f"of {launch.world_size} ranks {len(missing)} have not come to {where} within"
            f" {seconds:g} s: {some(missing)}; start all of them at the same time, with the same"
            " number of nodes everywhere, or fewer"
        )

    if gpu:
        check_own_gpus(store, launch)

    return store


def host_store(launch: Launch, seconds: float) -> dist.TCPStore:
    """Listen for the other ranks at the launcher's port, or at a free one if it is taken.

    `deepspeed` uses the same port for every run (29500), so a second run on a machine finds it
    taken. If one command has started all ranks on this machine, a file tells them the port.
    """
    options = {
        "world_size": launch.world_size,
        "is_master": True,
        "timeout": timedelta(seconds=seconds),
        "wait_for_workers": False,
    }
    if not launch.on_one_machine:
        return dist.TCPStore(launch.master, launch.port, **options)

    try:
        store = dist.TCPStore(launch.master, launch.port, **options)
    except RuntimeError:
        store = dist.TCPStore(launch.master, 0, **options)

    note = port_note()
    note.parent.mkdir(mode=0o700, exist_ok=True)
    if note.parent.lstat().st_uid != os.getuid():
        raise UsageError(f"{note.parent} is another user's; set TMPDIR to a folder of your own")

    write_text(note, str(store.port))

    return store


def reach_store(launch: Launch, deadline: float) -> dist.TCPStore:
    """Connect to the store of rank 0, or of torchrun's agent."""
    port = launch.port

    while launch.on_one_machine:
        with contextlib.suppress(OSError):
            port = int(port_note().read_text())
            break

        if time.monotonic() > deadline:
            raise ValueError("it has not written the port it listens at")
        time.sleep(0.05)

    return dist.TCPStore(
        launch.master,
        port,
        world_size=launch.world_size,
        is_master=False,
        timeout=timedelta(seconds=max(deadline - time.monotonic(), 1.0)),
        wait_for_workers=False,
    )


def port_note() -> Path:
    """Return the file in which rank 0 leaves its port, named after the ranks' parent process."""
    parent = hashlib.sha256(identity(os.getppid()).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"megatron_interbert-{os.getuid()}"
    return folder / f"{parent}.port"


def check_own_gpus(store: dist.Store, launch: Launch) -> None:
    """Raise UsageError on all ranks of this machine if two of them have the same GPU."""
    first = launch.rank - launch.local_rank
    ranks = range(first, min(first + launch.local_size, launch.world_size))
    owner: dict[bytes, int] = {}

    for rank in ranks:
        gpu = store.get(f"rank {rank}")
        if gpu in owner:
            raise UsageError(
                f"ranks {owner[gpu]} and {rank} on {launch.node} have the same GPU; start as many"
                " processes there as it has GPUs, or give each its own (srun --gpus-per-task=1)"
            )

        owner[gpu] = rank


def _came(store: dist.Store, rank: int, deadline: float) -> bool:
    left = max(deadline - time.monotonic(), 0.05)
    try:
        store.wait([f"rank {rank}"], timedelta(seconds=left))
    except RuntimeError:
        return False

    return True


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, cut at 160 characters, or the error's type."""
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def describe_launch(launch: Launch, state: ParallelState, device: torch.device) -> str:
    """Return a table of which rank runs where; collective."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{len(os.sched_getaffinity(0))} CPU cores"
    )

    rows = state.gather(
        (
            state.rank,
            state.node,
            os.getpid(),
            f"{device} ({name})",
            state.data_rank,
            state.tensor_rank,
            *([state.expert_rank] if state.expert_size > 1 else []),
        )
    )
    head = ["rank", "node", "process", "device", "data parallel", "tensor parallel"]
    if state.expert_size > 1:
        head.append("expert parallel")

    return "\n".join([heading(launch, len({row[1] for row in rows})), *aligned([head, *rows])])


def heading(launch: Launch, nodes: int) -> str:
    """Return a heading such as `torchrun: 4 ranks on 2 nodes, meeting at n0:29500`."""
    return (
        f"{launch.launcher}: {launch.world_size} ranks on {nodes} node{'s' * (nodes > 1)}, meeting"
        f" at {launch.master}:{launch.port}"
    )


def aligned(rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a table with aligned columns."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]

    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    ]


def quiet_libraries() -> None:
    """Silence messages of no use to users: DeepSpeed's progress log, its notes on skipped steps (we
    print our own), and deprecation warnings about torch's collectives.
    """
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(lambda record: not any(text in record.getMessage() for text in SAY_NOTHING))
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed.*|deepspeed.*"
    )
    warnings.filterwarnings("ignore", category=UserWarning, message=".*lr_scheduler.step.*")
