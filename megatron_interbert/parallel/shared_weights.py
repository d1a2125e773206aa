"""Share a model's weights among data-parallel ranks that use it for different work.

Every rank keeps an equal part of each parameter, and gathers the whole when it reads it. Gathering
takes all ranks, yet each works at its own pace. So a rank that lacks weights meets the others: all
say what they lack, and gather that. A rank whose work is done goes on meeting until the others'
is done too.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_interbert.parallel.collectives import start_gather
from megatron_interbert.parallel.state import ParallelState

NOTHING = -1  # said by a rank that lacks no weights


class SharedWeights:
    """Hold this rank's part of each parameter of a model on torch's meta device, and put into the
    model's modules what gathers parameters on `device` when they are read.

    Parts are kept on `kept_on`, which is the host where the weights in training are.

    A part is flat, of ceil(elements / ranks) elements, as ZeRO stage 3 divides. Parameters are
    gathered by units: a layer, or a part of the model outside of its stacks. Those that were read
    last stay, up to `most` elements; beside them there may be one unit that another rank lacks.
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
        self._gathered: dict[str, dict[str, torch.Tensor]] = {}  # by unit; the last read is last

        for prefix, module in model.named_modules():
            names = {}
            for key, parameter in module._parameters.items():
                names[key] = f"{prefix}.{key}".lstrip(".")
                self._share(names[key], parameter)

            module._parameters = ReadParameters(self, names)

    def _share(self, name: str, parameter: nn.Parameter) -> None:
        size = -(-parameter.numel() // self.state.data_size)
        self.shapes[name] = parameter.shape
        self.parts[name] = torch.zeros(size, dtype=parameter.dtype, device=self.kept_on)
        self._units.setdefault(unit_of(name), []).append(name)

    @property
    def gathered(self) -> int:
        """Return how many elements are gathered now."""
        return sum(map(self._elements, self._gathered))

    def read(self, name: str) -> torch.Tensor:
        """Return a whole parameter, in its shape; meets the other ranks if it is not here."""
        unit = unit_of(name)
        if unit not in self._gathered:
            self._make_room(self._elements(unit))
            self._meet(unit)

        self._gathered[unit] = self._gathered.pop(unit)

        return self._gathered[unit][name]

    def finish(self) -> None:
        """Meet the other ranks until none lacks weights, and drop what is gathered."""
        while self._meet(None):
            pass
        self._gathered.clear()

    def _meet(self, lacking: str | None) -> bool:
        """Gather what any rank lacks, and keep the unit that this one is `lacking`; return whether
        any lacks something.
        """
        units = list(self._units)
        own = NOTHING if lacking is None else units.index(lacking)
        rows, work = start_gather(torch.tensor([own], device=self.device), self.state.data_group)
        work.wait()
        wanted = set(rows.tolist()) - {NOTHING}

        for number in sorted(wanted):
            whole = self._gather(units[number])
            if number == own:
                self._gathered[lacking] = whole

        return bool(wanted)

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
        """Drop the units that were not read for longest until `elements` more are within `most`."""
        while self._gathered and self.gathered + elements > self.most:
            del self._gathered[next(iter(self._gathered))]

    def _elements(self, unit: str) -> int:
        return sum(self.shapes[name].numel() for name in self._units[unit])


class ReadParameters(dict):
    """Stand in for the dictionary in which a module keeps its parameters: a parameter that is read
    is gathered, while iteration finds this rank's parts.
    """

    def __init__(self, weights: SharedWeights, names: dict[str, str]) -> None:
        super().__init__({key: weights.parts[name] for key, name in names.items()})
        self.weights = weights
        self.names = names

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.weights.read(self.names[key])


class MeetingState(ParallelState):
    """Represent ranks that share weights: before they communicate as a whole, they meet until none
    lacks any.
    """

    def __init__(self, state: ParallelState, weights: SharedWeights) -> None:
        vars(self).update(vars(state))
        self.weights = weights

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
