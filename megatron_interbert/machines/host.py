"""Set up a process before it trains: threads and memory on a CPU, determinism; measure free
memory.
"""

import contextlib
import ctypes
import os
from pathlib import Path

import psutil
import torch

from megatron_interbert.parallel.launch import Launch

# parameters of mallopt, from malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGE = 8 << 20  # bytes from which on a tensor's memory goes back when it is freed


def use_cores(launch: Launch) -> None:
    """Limit torch's threads to this rank's share of the cores, unless OMP_NUM_THREADS is set.

    Otherwise the threads of all ranks compete: two ranks on two cores reached 75 instead of 1,165
    samples/s.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size))


def keep_freed_memory() -> None:
    """Have glibc keep freed memory of up to LARGE bytes for the next tensor, as the caching
    allocator of a GPU does.

    Otherwise every tensor comes fresh from the kernel, which zeroes its pages: a step of the base
    model on two cores (batch 16, fp32) took 2.5 s with this, and 3.0 s with 1 MiB for LARGE.
    Without a limit a step is no faster, and what large models free stays in pieces. Does nothing
    with other C libraries.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_memory() -> None:
    """Have glibc give back what it keeps of freed memory, after a phase that used more than those
    that follow. Does nothing with other C libraries.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_memory(
    own_groups: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the bytes that this process may still allocate.

    That is what is free on the machine, or less if one of its control groups (a Slurm job's --mem,
    a container) has a limit. Cached files that can be dropped count as free.
    """
    free = psutil.virtual_memory().available
    lines = own_groups.read_text().splitlines() if own_groups.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":  # version 2
            top = groups
            limit = "memory.max"
            used = "memory.current"
            droppable = "inactive_file"
        elif "memory" in controllers.split(","):
            top = groups / "memory"
            limit = "memory.limit_in_bytes"
            used = "memory.usage_in_bytes"
            droppable = "total_inactive_file"
        else:
            continue

        inside = top / path.lstrip("/")
        for group in (inside, *(above for above in inside.parents if above.is_relative_to(top))):
            if (
                not (group / limit).exists()
                or (allowed := (group / limit).read_text().strip()) == "max"
            ):
                continue

            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            free = min(
                free, int(allowed) - int((group / used).read_text()) + int(stat.get(droppable, 0))
            )

    return max(free, 0)


def free_swap() -> int:
    """Return the bytes of swap that are free on the machine: training that reaches them is slow,
    and yet not impossible.
    """
    return psutil.swap_memory().free


def same_bits_every_time() -> None:
    """Forbid operations whose result depends on the order of a GPU's threads.

    Must be called before a GPU is first used.
    """
    # without it torch refuses cuBLAS's matrix products
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing of ours reads it
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its gradients are summed in any order
    torch.backends.cuda.enable_cudnn_sdp(False)
