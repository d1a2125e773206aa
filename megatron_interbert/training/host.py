"""What a process sets for itself before it trains: threads and memory where its device is the CPU, determinism."""

import contextlib
import ctypes
import os

import torch

from megatron_interbert.parallel.launch import Launch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def use_cores(launch: Launch) -> None:
    """Give this rank its share of the cores, unless OMP_NUM_THREADS says how many.

    Without it the threads of ranks spin against one another: 75 against 1,165 samples/s was measured for two ranks on two cores.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size))


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next tensor, as the caching allocator of a GPU does.

    Else every large tensor comes fresh from the kernel, which zeroes its pages: of a step of the base model on two cores (batch 16,
    fp32) 6.8 s became 4.9 s, for a tenth more memory at the peak. Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def same_bits_every_time() -> None:
    """Refuse operations whose result depends on the order in which a GPU's threads come. To be called before a GPU is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it its products are refused
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing of ours reads it
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its gradients are summed in any order
    torch.backends.cuda.enable_cudnn_sdp(False)
