"""Measure on several ranks of this machine, each a process."""

import os
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from megatron_interbert.errors import TrainingStopped
from megatron_interbert.machines.processes import start_processes
from megatron_interbert.parallel.launch import free_port

Measure = Callable[..., dict[str, Any]]


def run_ranks(measure: Measure, ranks: int, *arguments: Any) -> dict[str, Any]:
    """Call measure(rank, *arguments) on every rank; return the result of the first.

    Raises TrainingStopped if a rank ends before.
    """
    context = get_context("spawn")
    mine, theirs = context.Pipe()
    port = free_port()
    processes = [
        context.Process(
            target=be_rank, args=(theirs, measure, rank, ranks, port, *arguments), daemon=True
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()

    while not mine.poll(0.2):
        if any(process.exitcode for process in processes):
            raise TrainingStopped("a rank ended before it was measured; see its message above")

    result = mine.recv()
    for process in processes:
        process.join()

    return result


def be_rank(
    line: Connection, measure: Measure, rank: int, ranks: int, port: int, *arguments: Any
) -> None:
    """Be one rank, and send the result if it is the first."""
    place = {"RANK": rank, "WORLD_SIZE": ranks}
    place |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (place | meeting).items()})
    start_processes()

    result = measure(rank, *arguments)
    if rank == 0:
        line.send(result)
    dist.barrier()
