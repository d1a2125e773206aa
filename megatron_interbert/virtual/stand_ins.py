"""Stand in for what a virtual rank lacks beside its other ranks: Triton's GPU and an NVMe disk."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from megatron_interbert.kernels import choice
from megatron_interbert.parallel import exchange
from megatron_interbert.training import update


@contextlib.contextmanager
def triton_without_gpu(name: str) -> Iterator[None]:
    """Let Triton's kernels, if `--kernels` names them, be chosen and launched within the context; a
    launch does nothing.

    What they write and keep is allocated by torch before the launch, so its memory is counted.
    """
    if name != "triton":
        yield
        return

    from triton.runtime.jit import JITFunction

    with (
        mock.patch.object(choice, "why_no_triton", return_value=None),
        mock.patch.object(JITFunction, "run", launch_nothing),
    ):
        yield


def launch_nothing(*_: Any, **__: Any) -> None:
    """Take the place of a launch. A mock would keep all arguments alive."""


class Disk:
    """Accept the reads and writes of DeepSpeed's I/O handle, and do nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.pending = 0
        self.pinned: set[int] = set()

    def new_cpu_locked_tensor(self, elements: int, like: torch.Tensor) -> torch.Tensor:
        """Return a buffer; it counts as pinned."""
        buffer = torch.empty(elements, dtype=like.dtype)
        self.pinned.add(buffer.untyped_storage()._cdata)

        return buffer

    def free_cpu_locked_tensor(self, buffer: torch.Tensor) -> bool:
        """Forget a buffer."""
        self.pinned.discard(buffer.untyped_storage()._cdata)
        return True

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Check whether a tensor is in one of the buffers."""
        return tensor.untyped_storage()._cdata in self.pinned

    def async_pread(self, *_: Any) -> int:
        """Count an operation that has begun; return the code of success."""
        self.pending += 1
        return 0

    async_pwrite = async_pread

    def wait(self) -> int:
        """Return how many operations have been completed since the last call."""
        completed = self.pending
        self.pending = 0

        return completed


@contextlib.contextmanager
def balanced_experts() -> Iterator[None]:
    """Let every expert get an equal number of tokens within the context: routers choose by content,
    which virtual ranks do not have.
    """
    with mock.patch.object(exchange, "read_counts", evenly):
        yield


def evenly(sizes: Sequence[torch.Tensor], rows: int) -> list[list[int]]:
    """Return vectors of the same lengths as `sizes`, with `rows` divided evenly over each."""
    found = []
    for vector in sizes:
        ends = [rows * place // len(vector) for place in range(len(vector) + 1)]
        found.append([end - start for start, end in pairwise(ends)])

    return found


@contextlib.contextmanager
def nvme_without_disk() -> Iterator[str]:
    """Let DeepSpeed offload to a folder within the context, in which nothing is written but empty
    folders; return it.
    """
    with (
        tempfile.TemporaryDirectory(prefix="interbert-dry-run-") as folder,
        mock.patch.object(AsyncIOBuilder, "load", return_value=SimpleNamespace(aio_handle=Disk)),
        mock.patch.object(update, "check_swap_files"),
    ):
        yield folder
