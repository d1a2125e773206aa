"""Run a function on several gloo ranks, each in its own process; a failing rank fails the test with
its traceback.
"""

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.launching import free_ports
from tests.warm import start_server


def _rank(
    rank: int, ranks: int, port: int, function: Callable[..., None], arguments: tuple
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )

    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        raise
    finally:
        dist.destroy_process_group()


def run_on_ranks(ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call function(*arguments) on every rank; the function must be at module level."""
    start_server()
    mp.start_processes(
        _rank,
        (ranks, free_ports(1)[0], function, arguments),
        nprocs=ranks,
        start_method="forkserver",
    )
