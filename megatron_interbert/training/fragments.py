"""Read and fill a rank's part of the fp32 weights and Adam's moments, for every ZeRO stage, as runs
of flattened parameters.

ZeRO lays parameters end to end and cuts that line evenly over data-parallel ranks, so a rank holds
a run of some of them. This file is the only one that knows how DeepSpeed keeps them (0.19:
`single_partition_of_fp32_groups` with `_hp_mapping` in stages 1 and 2,
`fp32_partitioned_groups_flat` in stage 3).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_interbert.training.engine import Engine
from megatron_interbert.weights.reader import CheckpointReader

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Fragment:
    """Represent a run of one flattened parameter.

    `start` is its first element, `shape` that of the whole parameter (this tensor-parallel rank's
    slice); `tensors` are flat views of the live weight and moments (keys as in `KINDS`).
    """

    name: str
    start: int
    shape: tuple[int, ...]
    tensors: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        return self.tensors["weight"].numel()

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

    def held(self) -> Iterator[Fragment]:
        """Yield all fragments in this rank's memory; at stage 0 that is its whole slice."""
        for flat, runs in self._lines():
            moments = self._moments(flat)
            line = {
                "weight": flat.detach().view(-1),
                **{kind: moments[kind].view(-1) for kind in MOMENTS},
            }
            if self.engine.ema is not None:
                line["ema"] = self.engine.ema.average_of(flat)
            for parameter, shape, start, offset, length in runs:
                if length:
                    pieces = {
                        kind: tensor[offset : offset + length] for kind, tensor in line.items()
                    }
                    yield Fragment(self.names[id(parameter)], start, tuple(shape), pieces)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Iterate over the fp32 tensors of this rank that Adam updates."""
        return (flat for flat, _ in self._lines())

    def owned(self) -> Iterator[Fragment]:
        """Yield the fragments that this rank saves; over all ranks, each element appears once."""
        for fragment in self.held():
            if self.stage:
                yield fragment
                continue

            share = -(-fragment.length // self.state.data_size)
            first, last = (min(share * (self.state.data_rank + i), fragment.length) for i in (0, 1))
            if first < last:
                yield fragment.part(first, last)

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
                mapped = [(p, p._hp_mapping) for p in group if p._hp_mapping is not None]
                yield (
                    flat,
                    [
                        (
                            p,
                            p.shape,
                            m.lp_fragment_address.start,
                            m.hp_fragment_address.start,
                            m.lp_fragment_address.numel,
                        )
                        for p, m in mapped
                    ],
                )
        else:
            for flat, group in zip(
                self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True
            ):
                runs = []
                offset = 0

                for p in group:
                    size = p.partition_numel()
                    start = size * self.state.data_rank
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
        steps = {float(self._moments(flat)["step"]) for flat, _ in self._lines()}
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
    def fill(self, reader: CheckpointReader, scalars: dict[str, Any]) -> None:
        """Load weights, moments and scalars from a checkpoint of any layout and precision."""
        for fragment in self.held():
            for kind in fragment.tensors:
                saved = kind if kind != "ema" or reader.has("ema") else "weight"
                run = reader.get_run(
                    *(fragment.name, saved, self.state.tensor_rank, self.state.tensor_size),
                    *(fragment.shape, fragment.start, fragment.length),
                )
                fragment.tensors[kind].copy_(run)

        for flat, _ in self._lines():
            self._moments(flat)["step"].fill_(scalars["adam_step"])
        if self.engine.precision == "fp16" and "loss_scaler" in scalars:
            vars(self.zero.loss_scaler).update(scalars["loss_scaler"])

        self._refresh_model()

    @torch.no_grad()
    def copy_into(self, model: nn.Module, kind: str = "weight") -> None:
        """Copy the weights (`kind` "weight") or their average ("ema") from all ranks into a model
        that every data-parallel rank holds whole (its tensor-parallel slice).
        """
        targets = dict(model.named_parameters())
        flat = {
            name: torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
            for name, p in targets.items()
        }

        for fragment in self.owned():
            flat[fragment.name][fragment.start : fragment.start + fragment.length] = (
                fragment.tensors[kind]
            )

        for name, parameter in targets.items():
            parameter.copy_(self.state.sum_over_data(flat.pop(name)).view_as(parameter))

    def _refresh_model(self) -> None:
        """Cast the fp32 weights to those the model computes with, as DeepSpeed does at the end of a
        step.
        """
        if self.stage == 0:
            self.engine.update.refresh_model()
        elif self.stage < 3:
            self.zero.update_lp_params()
        else:
            self.zero.checkpoint_event_prologue()  # split parameters that every rank keeps whole,
            for flat, low in zip(
                self.zero.fp32_partitioned_groups_flat,
                self.zero.fp16_partitioned_groups_flat,
                strict=True,
            ):
                low.copy_(flat)

            self.zero.checkpoint_event_epilogue()  # and gather them again with their new values
