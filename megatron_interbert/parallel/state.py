"""Form the data-parallel and tensor-parallel groups; serves as DeepSpeed's `mpu`."""

import copy
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.device import this_device as this_device  # part of this interface
from megatron_interbert.parallel.launch import node_name
from megatron_interbert.parallel.placement import Placement

# The watchdog ends a run that hangs, and says why: no collective may time out before it.
COLLECTIVE_TIMEOUT = timedelta(days=1)


class ParallelState:
    """Hold this process's ranks and groups.

    Ranks of a tensor-parallel group are neighbours, since they communicate most; data-parallel
    groups stride over them. Without torch.distributed, or if `alone`, this is a single process.
    """

    def __init__(
        self, tensor_parallel_size: int = 1, sequence_parallel: bool = False, alone: bool = False
    ) -> None:
        together = dist.is_initialized() and not alone
        self.node = node_name()
        self.rank, self.world_size = (
            (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        )

        if self.world_size % tensor_parallel_size:
            raise UsageError(
                f"--tensor-model-parallel-size {tensor_parallel_size} does not divide the"
                f" {self.world_size} processes; start a multiple of it"
            )

        self.tensor_size = tensor_parallel_size
        self.data_size = self.world_size // tensor_parallel_size
        self.tensor_rank = self.rank % tensor_parallel_size
        self.data_rank = self.rank // tensor_parallel_size
        self.tensor_group: dist.ProcessGroup | None = None
        self.data_group: dist.ProcessGroup | None = None
        self._data_ranks = list(range(self.tensor_rank, self.world_size, tensor_parallel_size))
        if together:
            self._make_groups()

        self.placement = Placement(
            self.tensor_group, shared=sequence_parallel and self.tensor_size > 1
        )

    def _make_groups(self) -> None:
        # all ranks must take part in creating every group
        for first in range(0, self.world_size, self.tensor_size):
            ranks = list(range(first, first + self.tensor_size))
            group = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)
            if self.rank in ranks:
                self.tensor_group = group

        for first in range(self.tensor_size):
            ranks = list(range(first, self.world_size, self.tensor_size))
            group = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)
            if self.rank in ranks:
                self.data_group = group

    def with_replicated_rows(self) -> "ParallelState":
        """Return a copy with the same groups, without sequence parallelism."""
        state = copy.copy(self)
        state.placement = Placement(self.tensor_group)
        return state

    @property
    def is_main(self) -> bool:
        """Check whether this is rank 0, which prints and writes logs."""
        return self.rank == 0

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce in place over the data-parallel group."""
        if self.data_size > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def sum_over_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce in place over the tensor-parallel group."""
        if self.tensor_size > 1:
            dist.all_reduce(tensor, group=self.tensor_group)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Gather a small picklable value from all ranks; return them in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=group)

        return values

    # The interface that DeepSpeed expects of an mpu.
    def get_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.tensor_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.tensor_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._data_ranks
