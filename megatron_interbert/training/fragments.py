"""Read and fill a rank's part of the fp32 weights and Adam's moments, for every ZeRO stage, as runs
of flattened parameters.

ZeRO lays parameters end to end and cuts that line evenly over data-parallel ranks, so a rank holds
a run of some of them. This file is the only one that knows how DeepSpeed keeps them (0.19:
`single_partition_of_fp32_groups` with `_hp_mapping` in stages 1 and 2,
`fp32_partitioned_groups_flat` in stage 3).
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from megatron_interbert.model.initialise import PART
from megatron_interbert.model.partition import SliceRun, full_shape, is_expert, place_of
from megatron_interbert.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


class Source(Protocol):
    """Read any run of a parameter: first weights, given ones, or a checkpoint."""

    def read(self, kind: str, run: SliceRun) -> torch.Tensor:
        """Return a run of a parameter's tensor of a kind (as in `KINDS`): [length]."""


@dataclass(frozen=True)
class Outline:
    """Describe a run of `length` elements of one flattened parameter, as files do.

    `start` is its first element, `shape` that of the whole: this tensor-parallel rank's slice, or
    all experts.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    length: int

    @property
    def written_shape(self) -> tuple[int, ...]:
        """Return the shape in which the run is written: the parameter's if it is all of it."""
        return self.shape if self.length == math.prod(self.shape) else (self.length,)


@dataclass
class Fragment:
    """Represent a run of one flattened parameter, as `Outline` describes it; `tensors` are flat
    views of the live weight and moments (keys as in `KINDS`).
    """

    name: str
    start: int
    shape: tuple[int, ...]
    tensors: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        return next(iter(self.tensors.values())).numel()

    def part(self, first: int, last: int) -> "Fragment":
        """Return the part of this run from element `first` up to, not including, `last`."""
        return Fragment(
            self.name,
            self.start + first,
            self.shape,
            {k: t[first:last] for k, t in self.tensors.items()},
        )


class FragmentedState:
    """View an engine's training state as fragments, to write it or fill it in."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stage = engine.update.stage
        self.state = engine.state
        self.zero = engine.deepspeed.optimizer
        self.adam = engine.update.optimizer
        self.names = {id(p): name for name, p in engine.model.named_parameters()}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of tensors that the run keeps."""
        average = ("ema",) if self.engine.ema is not None else ()
        return ("weight", *MOMENTS, *average)

    def held(self, kinds: Sequence[str] | None = None, change: bool = False) -> Iterator[Fragment]:
        """Yield all fragments that this rank keeps, with their tensors of all or some kinds; at
        stage 0 that is its whole slice.

        Tensors are valid until the next fragment is asked for: they may come from a disk, to which
        they return if the caller will `change` them.
        """
        for fragment in self._fragments(self.kinds if kinds is None else kinds, change):
            if fragment.length:
                yield fragment

    def _fragments(self, kinds: Sequence[str], change: bool = False) -> Iterator[Fragment]:
        """Yield this rank's fragment of each parameter, in the same order on all ranks; empty where
        other ranks hold the parameter.
        """
        for number, (flat, runs) in enumerate(self._lines()):
            with self._in_memory(number, change):
                line = {kind: self._tensor(flat, kind) for kind in kinds}
                for parameter, shape, start, offset, length in runs:
                    pieces = {
                        kind: tensor[offset : offset + length] for kind, tensor in line.items()
                    }
                    yield Fragment(self.names[id(parameter)], start, tuple(shape), pieces)

    @contextlib.contextmanager
    def _in_memory(self, number: int, change: bool) -> Iterator[None]:
        """Have an fp32 tensor and its moments in memory within the context; if they `change`, write
        them back and round the weights into those that the model computes with.
        """
        if self.stage < 3:
            yield
            return

        swapped = self.zero._swappable_optimizer_subgroup(number)
        if swapped:
            self.zero._optimizer_states_and_gradient_swap_in(number)

        try:
            yield
            if change:
                self.zero._reassign_or_swap_out_partitioned_parameters(number)
        finally:
            if swapped and change:
                self.zero._optimizer_states_and_gradient_swap_out(number)
            elif swapped:
                self.zero._release_swap_buffers(number)

    def _tensor(self, flat: torch.Tensor, kind: str) -> torch.Tensor:
        """Return what belongs to an fp32 tensor that Adam updates, flat: itself ("weight"), one of
        its moments or its average.
        """
        if kind == "weight":
            return flat.detach().view(-1)
        if kind == "ema":
            return self.engine.ema.average_of(flat)
        return self._moments(flat)[kind].view(-1)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Iterate over the fp32 tensors of this rank that Adam updates; each is in memory until the
        next is asked for.
        """
        for number, (flat, _) in enumerate(self._lines()):
            with self._in_memory(number, change=False):
                yield flat

    def owned(self) -> Iterator[Fragment]:
        """Yield the fragments that this rank saves; over all ranks, each element appears once.

        Their tensors are valid until the next fragment is asked for.
        """
        return (f for f in map(self._own_part, self.held()) if f.length)

    def outline(self) -> list[Outline]:
        """Describe the fragments that `owned` yields, in its order, without their tensors."""
        found = []

        for _, runs in self._lines():
            for parameter, shape, start, _, length in runs:
                name = self.names[id(parameter)]
                first, last = self._own_range(name, length)
                if first < last:
                    start, shape = self._among_all(name, start + first, shape)
                    found.append(Outline(name, start, shape, last - first))

        return found

    def _among_all(
        self, name: str, start: int, shape: Sequence[int]
    ) -> tuple[int, tuple[int, ...]]:
        """Return the place of an element of this rank's slice, and its shape, as files have them:
        for experts in all of them, whose slices follow one another.
        """
        if not is_expert(name):
            return start, tuple(shape)

        rank, ranks = place_of(name, self.state)
        return rank * math.prod(shape) + start, tuple(full_shape(name, shape, ranks))

    @property
    def on_disk(self) -> bool:
        """Check whether the optimizer's state is on an NVMe disk."""
        return self.stage == 3 and self.zero.swap_optimizer

    def _own_part(self, fragment: Fragment) -> Fragment:
        """Return the part of a fragment that no other rank has."""
        return fragment.part(*self._own_range(fragment.name, fragment.length))

    def _own_range(self, name: str, length: int) -> tuple[int, int]:
        """Return (first, last + 1) of the elements of a fragment that no other rank has: at stage 0
        all ranks hold all.
        """
        if self.stage:
            return 0, length

        rank, ranks = self._sharing(name)
        share = -(-length // ranks)
        first, last = (min(share * (rank + i), length) for i in (0, 1))

        return first, last

    def _sharing(self, name: str) -> tuple[int, int]:
        """Return (rank, ranks) in the group that divides the state of a parameter."""
        if is_expert(name):
            return self.state.expert_data_rank, self.state.expert_data_size
        return self.state.data_rank, self.state.data_size

    def _lines(
        self,
    ) -> Iterator[tuple[torch.Tensor, list[tuple[nn.Parameter, torch.Size, int, int, int]]]]:
        """Yield each fp32 tensor that Adam updates, with the runs in it: (parameter, shape of its
        slice, start in the parameter, offset in the tensor, length).
        """
        if self.stage == 0:
            for weight, p in self.engine.update.weights():
                yield weight, [(p, p.shape, 0, 0, p.numel())]
        elif self.stage < 3:
            for flat, group in zip(
                self.zero.single_partition_of_fp32_groups, self.zero.bit16_groups, strict=True
            ):
                yield flat, [(p, p.shape, *mapped_run(p)) for p in group]
        else:
            for flat, group in zip(
                self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True
            ):
                runs = []
                offset = 0

                for p in group:
                    size = p.partition_numel()
                    start = size * self._sharing(self.names[id(p)])[0]
                    runs.append(
                        (p, p.ds_shape, start, offset, max(0, min(size, p.ds_numel - start)))
                    )
                    offset += size

                yield flat, runs

    def _moments(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return Adam's state of a tensor; before the first step, create it as torch would."""
        state = self.adam.state[flat]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state |= {
                kind: torch.zeros_like(flat, memory_format=torch.preserve_format)
                for kind in MOMENTS
            }

        return state

    def scalars(self) -> dict[str, Any]:
        """Return Adam's step count and, under fp16, the loss scaler's state."""
        steps = {float(self.adam.state[flat].get("step", 0.0)) for flat, _ in self._lines()}
        if len(steps) != 1:
            raise RuntimeError(
                f"Adam has taken different numbers of steps in its groups: {sorted(steps)}"
            )

        values: dict[str, Any] = {"adam_step": steps.pop()}
        if self.engine.precision == "fp16":
            scaler = vars(self.zero.loss_scaler)
            values["loss_scaler"] = {
                key: value for key, value in scaler.items() if isinstance(value, (bool, int, float))
            }

        return values

    @torch.no_grad()
    def fill_weights(self, source: Source) -> None:
        """Fill in the weights to start from; moments and average do not exist yet."""
        with self._refreshing_model():
            for fragment in self.held(["weight"], change=True):
                self._read_into(fragment, source)

    def _read_into(self, fragment: Fragment, source: Source) -> None:
        place = place_of(fragment.name, self.state)
        run = SliceRun(fragment.name, fragment.shape, *place, fragment.start, fragment.length)

        for part in run.split(PART):
            first = part.start - fragment.start
            for kind, tensor in fragment.tensors.items():
                tensor[first : first + part.length] = source.read(kind, part)

    @torch.no_grad()
    def fill(self, source: Source, scalars: dict[str, Any]) -> int:
        """Fill in weights, moments and scalars from a checkpoint of any layout and precision;
        return how many elements were read.
        """
        count = 0

        with self._refreshing_model():
            for fragment in self.held(change=True):
                self._read_into(fragment, source)
                count += fragment.length * len(fragment.tensors)

        for flat, _ in self._lines():
            self.adam.state[flat]["step"].fill_(scalars["adam_step"])
        if self.engine.precision == "fp16" and "loss_scaler" in scalars:
            vars(self.zero.loss_scaler).update(scalars["loss_scaler"])

        return count

    @torch.no_grad()
    def copy_into(self, model: nn.Module, kind: str = "weight") -> None:
        """Copy the weights (`kind` "weight") or their average ("ema") from all ranks into a model
        that every data-parallel rank holds whole: its tensor-parallel slice, and all experts.
        """
        targets = dict(model.named_parameters())

        for fragment in map(self._own_part, self._fragments([kind])):
            target = targets[fragment.name].view(-1)
            for first, elements in self._of_all_ranks(fragment, kind, target.device):
                target[first : first + len(elements)] = elements

    def _of_all_ranks(
        self, fragment: Fragment, kind: str, device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield a flat parameter with all experts, from the parts of all ranks, no two of which
        have the same element, in runs of up to PART elements: (first element, elements).
        """
        start, shape = self._among_all(fragment.name, fragment.start, fragment.shape)
        own = fragment.tensors[kind]
        length = math.prod(shape)

        for first in range(0, length, PART):
            elements = torch.zeros(min(PART, length - first), device=device)
            put_overlap(elements, first, own, start)
            self.state.sum_over_data(elements)
            if self._is_divided_by_tensor_ranks(fragment.name):
                self.state.sum_over_tensor(elements)

            yield first, elements

    def _is_divided_by_tensor_ranks(self, name: str) -> bool:
        """Check whether tensor-parallel ranks too divide a parameter's state, as they do that of
        experts.
        """
        return is_expert(name) and self.state.experts_apart

    @torch.no_grad()
    def copy_parts(self, parts: dict[str, torch.Tensor], kind: str = "weight") -> None:
        """Copy the weights or their average into equal parts of the parameters, flat, of
        ceil(elements / ranks) elements: those that this rank keeps at stage 3. Experts, which
        DeepSpeed divides in another way, come from all ranks.
        """
        for fragment in self._fragments([kind]):
            part = parts[fragment.name]
            if self._is_divided_by_tensor_ranks(fragment.name):
                begin = len(part) * self.state.data_rank
                for first, elements in self._of_all_ranks(fragment, kind, part.device):
                    put_overlap(part, begin, elements, first)
                continue

            if fragment.length and fragment.start != len(part) * self.state.data_rank:
                raise RuntimeError(f"{fragment.name}: DeepSpeed divides it in another way")
            part[: fragment.length] = fragment.tensors[kind]

    @contextlib.contextmanager
    def _refreshing_model(self) -> Iterator[None]:
        """Cast the fp32 weights that change within the context to those the model computes with, as
        DeepSpeed does at the end of a step; at stage 3 `_in_memory` casts them.
        """
        if self.stage == 3:
            self.zero.checkpoint_event_prologue()  # split parameters that every rank keeps whole,
        yield
        if self.stage == 0:
            self.engine.update.refresh_model()
        elif self.stage < 3:
            self.zero.update_lp_params()
        else:
            self.zero.checkpoint_event_epilogue()  # and gather them again with their new values


def put_overlap(target: torch.Tensor, start: int, run: torch.Tensor, first: int) -> None:
    """Copy the elements that two runs of one line have in common to `target`, which begins at
    `start` of the line, from `run`, which begins at `first`.
    """
    begin = max(start, first)
    end = min(start + len(target), first + len(run))
    if begin < end:
        target[begin - start : end - start] = run[begin - first : end - first]


def mapped_run(parameter: nn.Parameter) -> tuple[int, int, int]:
    """Return (start in the parameter, offset in the fp32 tensor, length) of the run that this rank
    holds at stages 1 and 2; the length is 0 if others hold the parameter.
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, 0, 0

    held = mapping.lp_fragment_address

    return held.start, mapping.hp_fragment_address.start, held.numel
