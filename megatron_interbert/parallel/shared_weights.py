"""Share a model's weights among data-parallel ranks that use it for different work.

Every rank keeps an equal part of each parameter, and gathers the whole when it reads it. Gathering
takes all ranks, yet each works at its own pace. So a rank that lacks weights meets the others: each
says what it lacks, and they gather one unit of it together. A rank that has finished keeps meeting
until all have.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_interbert.parallel.collectives import start_gather
from megatron_interbert.parallel.state import ParallelState


class SharedWeights:
    """Replace the parameters of a model on torch's meta device by this rank's parts; reading one
    gathers it whole on `device`.

    A part is flat, of ceil(elements / ranks) elements, and is kept on `kept_on`. Parameters are
    gathered by unit: a layer, or a part of the model outside its stacks. Up to `most` gathered
    elements stay in memory, plus one unit for another rank; a unit larger than `most` is gathered
    all the same. Raises ValueError if two modules share a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        state: ParallelState,
        device: torch.device,
        most: int,
        kept_on: torch.device,
    ) -> None:
        self.state = state
        self.device = device
        self.most = most
        self.kept_on = kept_on
        self.shapes: dict[str, torch.Size] = {}
        self.parts: dict[str, torch.Tensor] = {}
        self._units: dict[str, list[str]] = {}  # names of their parameters
        self._gathered: dict[str, dict[str, torch.Tensor]] = {}  # by unit

        named = list(model.named_parameters(remove_duplicate=False))
        if len({id(parameter) for _, parameter in named}) < len(named):
            raise ValueError("a parameter belongs to two modules, whose parts would be separate")
        for name, parameter in named:
            self._share(name, parameter)
        for prefix, module in model.named_modules():
            module._parameters = ReadParameters(self, prefix, module._parameters)

    def _share(self, name: str, parameter: nn.Parameter) -> None:
        size = -(-parameter.numel() // self.state.data_size)
        self.shapes[name] = parameter.shape
        self.parts[name] = torch.zeros(size, dtype=parameter.dtype, device=self.kept_on)
        self._units.setdefault(unit_of(name), []).append(name)

    @property
    def gathered(self) -> int:
        """Return how many elements stay gathered now."""
        return sum(map(self._elements, self._gathered))

    def read(self, name: str) -> torch.Tensor:
        """Return a whole parameter, in its shape; meets the other ranks while it is not here."""
        unit = unit_of(name)
        if unit not in self._gathered:
            self._make_room(self._elements(unit))
        while unit not in self._gathered:
            self._meet(unit)

        return self._gathered[unit][name]

    def finish(self) -> None:
        """Meet the other ranks until none lacks weights."""
        while self._meet(None):
            pass

    def drop(self) -> None:
        """Free what is gathered."""
        self._gathered.clear()

    def _meet(self, lacking: str | None) -> bool:
        """Gather the first of all units that any rank lacks; keep it if this one is `lacking` it.
        Return whether any rank lacks something.

        One unit at a time, so that ranks that have drifted apart get back in step.
        """
        units = list(self._units)
        nothing = len(units)
        own = nothing if lacking is None else units.index(lacking)
        rows, work = start_gather(torch.tensor([own], device=self.device), self.state.data_group)
        work.wait()
        first = int(rows.min())
        if first == nothing:
            return False

        whole = self._gather(units[first])
        if first == own:
            self._gathered[lacking] = whole

        return True

    def _gather(self, unit: str) -> dict[str, torch.Tensor]:
        started = {
            name: start_gather(self.parts[name].to(self.device), self.state.data_group)
            for name in self._units[unit]
        }
        whole = {}

        for name, (rows, work) in started.items():
            work.wait()
            shape = self.shapes[name]
            whole[name] = rows[: shape.numel()].view(shape)

        return whole

    def _make_room(self, elements: int) -> None:
        """Drop the units gathered most recently until `elements` more are within `most`: every pass
        reads the model in the same order, so they are the last to be needed again.
        """
        while self._gathered and self.gathered + elements > self.most:
            self._gathered.popitem()

    def _elements(self, unit: str) -> int:
        return sum(self.shapes[name].numel() for name in self._units[unit])


class ReadParameters(dict):
    """Stand in for the dictionary in which a module keeps its parameters: a parameter that is read
    as an attribute is gathered, while iteration finds this rank's parts.
    """

    def __init__(
        self, weights: SharedWeights, prefix: str, own: dict[str, nn.Parameter | None]
    ) -> None:
        self.weights = weights
        self.names = {key: f"{prefix}.{key}".lstrip(".") for key, p in own.items() if p is not None}
        parts = {key: weights.parts[name] for key, name in self.names.items()}
        super().__init__({**own, **parts})

    def __getitem__(self, key: str) -> torch.Tensor | None:
        name = self.names.get(key)
        return self.weights.read(name) if name else super().__getitem__(key)


class MeetingState(ParallelState):
    """Represent ranks that share weights: before they communicate as a whole, they meet until none
    lacks any.
    """

    weights: SharedWeights

    @classmethod
    def of(cls, state: ParallelState, weights: SharedWeights) -> "MeetingState":
        """Return a state with the groups of another."""
        found = cls.__new__(cls)
        vars(found).update(vars(state), weights=weights)
        return found

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        self.weights.finish()
        return super().sum_over_data(tensor)

    def barrier(self) -> None:
        self.weights.finish()
        super().barrier()

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        self.weights.finish()
        return super().gather(value, group)


def unit_of(name: str) -> str:
    """Return the unit in which a parameter is gathered: `stack.layers.3`, or a part of the model
    outside of its stacks.
    """
    part, *inside = name.split(".")
    return ".".join([part, *inside[:2]]) if inside[:1] == ["layers"] else part
