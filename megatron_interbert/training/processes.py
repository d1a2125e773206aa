"""Joining the other processes of a run: early and clear when they cannot meet, and nothing half-started when one of them is wrong."""

import logging
import os
import time
import warnings
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.agreement import some
from megatron_interbert.parallel.launch import MEETING_SECONDS, Launch, read_launch
from megatron_interbert.parallel.state import ParallelState, this_device
from megatron_interbert.training.host import keep_freed_memory, use_cores

SAY_NOTHING = (
    "OVERFLOW! Skipping step",  # the loop says so itself
    "unknown inputs or outputs type (<class 'megatron_interbert.data.packing.PackedBatch'>)",  # inputs without gradients
)


def start_processes() -> torch.device:
    """Join the process group (nccl on GPUs, gloo else) and give the device of this rank. UsageError when the ranks do not meet."""
    quiet_libraries()
    launch = read_launch()
    device = this_device()
    if device.type == "cpu":
        use_cores(launch)
        keep_freed_memory()
    # The one place that changes a value of DeepSpeed's. It would compile a shared-memory operation for inference here, which
    # training never calls, and a run that is killed while it compiles leaves a lock on which the next one hangs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():  # a program around this one may have joined already
        store = meet(launch)
        try:
            dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size)
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"{launch.node}: the process group cannot start ({first_line(error)})") from error
    deepspeed.init_distributed(dist_backend=backend, verbose=False)  # takes the group that is there
    return device


def meet(launch: Launch, seconds: float = MEETING_SECONDS) -> dist.Store:
    """A store that all ranks have come to. UsageError that names the ranks that have not, or what is in the way."""
    where = f"{launch.master}:{launch.port}"
    deadline = time.monotonic() + seconds
    hosts = launch.rank == 0 and not launch.hosted_by_agent
    try:
        store = dist.TCPStore(
            launch.master,
            launch.port,
            world_size=launch.world_size,
            is_master=hosts,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
        store = dist.PrefixStore(f"start {launch.attempt}", store)
        store.set(f"rank {launch.rank}", launch.node)
    except (RuntimeError, ValueError) as error:
        if hosts:
            raise UsageError(
                f"rank 0 on {launch.node} cannot listen at {where} ({first_line(error)}); if a run that was killed left processes"
                " behind, end them, or choose another port (deepspeed --master_port N, MASTER_PORT=N)"
            ) from error
        raise UsageError(
            f"rank {launch.rank} on {launch.node} has not reached rank 0 at {where} within {seconds:g} s ({first_line(error)}); is rank 0"
            " running, is that the right address, and is the port open between the machines?"
        ) from error
    missing = [rank for rank in range(launch.world_size) if not _came(store, rank, deadline)]
    if missing:
        raise UsageError(
            f"of {launch.world_size} ranks {len(missing)} have not come to {where} within {seconds:g} s: {some(missing)}; start all of"
            " them at the same time, with the same number of nodes everywhere, or fewer"
        )
    return store


def _came(store: dist.Store, rank: int, deadline: float) -> bool:
    left = max(deadline - time.monotonic(), 0.05)
    try:
        store.wait([f"rank {rank}"], timedelta(seconds=left))
    except RuntimeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """The beginning of a library's message."""
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def describe_launch(launch: Launch, state: ParallelState, device: torch.device) -> str:
    """Which rank runs where; called on all ranks."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{len(os.sched_getaffinity(0))} CPU cores"
    rows = state.gather((state.rank, state.node, os.getpid(), f"{device} ({name})", state.data_rank, state.tensor_rank))
    head = ("rank", "node", "process", "device", "data parallel", "tensor parallel")
    return "\n".join([heading(launch, len({row[1] for row in rows})), *aligned([head, *rows])])


def heading(launch: Launch, nodes: int) -> str:
    """`torchrun: 4 ranks on 2 nodes, meeting at n0:29500`."""
    return (
        f"{launch.launcher}: {launch.world_size} ranks on {nodes} node{'s' * (nodes > 1)}, meeting at {launch.master}:{launch.port}"
    )


def aligned(rows: Iterable[Iterable[Any]]) -> list[str]:
    """Lines of a table, columns below one another."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts]


def quiet_libraries() -> None:
    """Silence what says nothing: DeepSpeed's progress log and its notes on skipped steps (we print our own), the deprecation
    notes of torch's collectives."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(lambda record: not any(text in record.getMessage() for text in SAY_NOTHING))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*|deepspeed.*")
    warnings.filterwarnings("ignore", category=UserWarning, message=".*lr_scheduler.step.*")
