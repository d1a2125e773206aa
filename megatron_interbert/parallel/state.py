"""Form the data-parallel, tensor-parallel and expert-parallel groups; serves as DeepSpeed's `mpu`.

Experts are divided among neighbouring ranks, across data-parallel and tensor-parallel ones: the
expert-parallel group. Ranks that hold the same experts form the expert-data group, which sums their
gradients and, with ZeRO, shares their state.
"""

import copy
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.device import this_device as this_device  # part of this interface
from megatron_interbert.parallel.launch import node_name
from megatron_interbert.parallel.placement import Placement

# The watchdog ends a run that hangs, and says why: no collective may time out before it.
COLLECTIVE_TIMEOUT = timedelta(days=1)

# by which DeepSpeed (0.19) tells the parameters of experts from others; see expert_parameter
EXPERT_TAGS = (
    "allreduce",
    "group_name",
    "ds_zero_placement_family",
    "ds_zero_partition_group_name",
    "ds_zero_partition_process_group",
)


class ParallelState:
    """Hold this process's ranks and groups.

    Ranks of a tensor-parallel group are neighbours, since they communicate most; data-parallel
    groups stride over them. Without torch.distributed, or if `alone`, this is a single process.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        sequence_parallel: bool = False,
        alone: bool = False,
        expert_parallel_size: int = 1,
    ) -> None:
        together = dist.is_initialized() and not alone
        self.node = node_name()
        self.rank, self.world_size = (
            (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        )

        if self.world_size % tensor_parallel_size:
            raise UsageError(
                f"--tensor-model-parallel-size {tensor_parallel_size} does not divide the number"
                f" of processes, {self.world_size}; start a multiple of it"
            )

        if self.world_size % expert_parallel_size:
            raise UsageError(
                f"--expert-parallel-size {expert_parallel_size} does not divide the number of"
                f" processes, {self.world_size}; start a multiple of it"
            )

        self.tensor_size = tensor_parallel_size
        self.data_size = self.world_size // tensor_parallel_size
        self.tensor_rank = self.rank % tensor_parallel_size
        self.data_rank = self.rank // tensor_parallel_size
        self.tensor_group: dist.ProcessGroup | None = None
        self.data_group: dist.ProcessGroup | None = None
        self._data_ranks = list(range(self.tensor_rank, self.world_size, tensor_parallel_size))

        self.expert_size = expert_parallel_size
        self.expert_data_size = self.world_size // expert_parallel_size
        self.expert_rank = self.rank % expert_parallel_size
        self.expert_data_rank = self.rank // expert_parallel_size
        self.expert_group: dist.ProcessGroup | None = None
        self.expert_data_group: dist.ProcessGroup | None = None
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

        if self.expert_size > 1:
            self.make_expert_groups()

    def make_expert_groups(self) -> None:
        """Form the groups of experts, which a model with experts needs if there are several
        expert-parallel or tensor-parallel ranks; call it on all ranks.
        """
        if self.experts_apart or self.expert_size * self.tensor_size == 1:
            return

        for first in range(0, self.world_size, self.expert_size):
            ranks = list(range(first, first + self.expert_size))
            group = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)
            if self.rank in ranks:
                self.expert_group = group

        for first in range(self.expert_size):
            ranks = list(range(first, self.world_size, self.expert_size))
            group = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)
            if self.rank in ranks:
                self.expert_data_group = group

    @property
    def experts_apart(self) -> bool:
        """Check whether gradients of experts are summed over other ranks than those of other
        parameters.
        """
        return self.expert_data_group is not None

    @property
    def expert_group_name(self) -> str:
        """Return DeepSpeed's name of the groups of experts."""
        return f"ep_size_{self.expert_size}"

    def expert_parameter(self, *shape: int) -> nn.Parameter:
        """Make a parameter of experts, not filled, with the tags by which DeepSpeed sums and
        partitions it over the expert-data group (0.19).
        """
        parameter = nn.Parameter(torch.empty(*shape))
        if self.experts_apart:
            parameter.tensor_model_parallel = True  # each rank's share counts in the norm
            parameter.allreduce = False
            parameter.group_name = self.expert_group_name
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = self.expert_group_name
            parameter.ds_zero_partition_process_group = self.expert_data_group

        return parameter

    def for_evaluation(self) -> "ParallelState":
        """Return a copy with the same data-parallel and tensor-parallel groups, without sequence
        parallelism, in which each rank holds all experts.
        """
        state = copy.copy(self)
        state.placement = Placement(self.tensor_group)
        state.expert_rank = 0
        state.expert_size = 1
        state.expert_group = state.expert_data_group = None

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
