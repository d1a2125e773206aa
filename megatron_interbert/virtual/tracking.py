"""Track what a virtual rank does: the memory of its tensors, and its collectives in their order."""

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# what takes part in no exchange of data
IGNORED = ("barrier", "monitored_barrier_")
# torch's operations under the names of planning/traffic.py
NAMES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "alltoall",
}


@dataclass(frozen=True)
class Collective:
    """Describe one collective of a rank: its operation, its group ("tensor", "data",
    "secondary" or "world"), and the elements and dtype that it contributes.
    """

    operation: str
    group: str
    elements: int
    dtype: str

    @property
    def bytes(self) -> int:
        """Return the bytes that the rank contributes."""
        return self.elements * getattr(torch, self.dtype).itemsize


@dataclass
class Volumes:
    """Hold how often a rank calls each collective, and the bytes that it contributes."""

    calls: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)

    @classmethod
    def of(cls, collectives: list[Collective]) -> "Volumes":
        """Add up collectives by (operation, group)."""
        found = cls()
        for one in collectives:
            found.calls[one.operation, one.group] += 1
            found.bytes[one.operation, one.group] += one.bytes

        return found


class Tracker(TorchDispatchMode):
    """Count the bytes of all fake tensors that are alive, and record collectives.

    `groups` gives the name of each process group by torch's name of it.
    """

    def __init__(self, groups: dict[str, str]) -> None:
        super().__init__()
        self.groups = groups
        self.collectives: list[Collective] = []
        self.live = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def mark(self) -> int:
        """Return the peak since the last call, and start anew."""
        peak = self.peak
        self.peak = self.live
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._record(func, args)
        result = func(*args, **kwargs)
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, FakeTensor) and not tensor.is_meta:
                self._see(tensor)

        return result

    def _record(self, func: Any, args: tuple) -> None:
        operation = func._schema.name.split("::")[1]
        if operation in IGNORED:
            return

        group = next(a for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        ranks = dist.ProcessGroup.unbox(group)
        if ranks.size() == 1:  # nothing is exchanged
            return

        given = _inputs(operation, args)
        self.collectives.append(
            Collective(
                NAMES.get(operation, operation.strip("_")),
                self.groups.get(ranks.group_name, "world"),
                sum(tensor.numel() for tensor in given),
                str(given[0].dtype).removeprefix("torch.") if given else "uint8",
            )
        )

    def _see(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return

        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        del self._alive[key]
        self.live -= size


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _inputs(operation: str, args: tuple) -> list[torch.Tensor]:
    """Return the tensors that a rank contributes: by torch's convention they follow those for the
    result, if these are separate.
    """
    separate = ("gather", "scatter", "alltoall")
    given = args[1] if any(word in operation for word in separate) else args[0]

    return [tensor for tensor in tree_flatten(given)[0] if isinstance(tensor, torch.Tensor)]
