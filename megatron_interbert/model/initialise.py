"""Draw a model's first weights, each element from (seed, parameter name, index), so that they are
the same on every layout; or load given ones.

The generator is Philox, which jumps to any place of its sequence (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011): a rank draws the part of a parameter that it holds without
the rest.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.model.partition import SliceRun, full_shape, joined, place_of
from megatron_interbert.parallel.state import ParallelState

BLOCK = 1 << 16  # elements drawn from one key and counter; a block is always drawn whole
PART = 1 << 24  # most elements of a parameter in memory at once, beside the parameter itself


def draw_normal(seed: int, name: str, start: int, length: int) -> np.ndarray:
    """Draw elements [start, start + length) of a flattened parameter from N(0, 1): float32."""
    key = np.frombuffer(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "<u8")
    first = start // BLOCK
    last = -(-(start + length) // BLOCK)
    drawn = np.empty((last - first) * BLOCK, np.float32)

    def fill(block: int) -> None:
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, block, 0, 0]))
        begin = (block - first) * BLOCK
        generator.standard_normal(out=drawn[begin : begin + BLOCK], dtype=np.float32)

    if last - first == 1:
        fill(first)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, range(first, last)))

    return drawn[start - first * BLOCK :][:length]


@dataclass(frozen=True)
class FirstWeights:
    """Draw the weights that a model starts from: matrices from N(0, initializer_range), gains of
    LayerNorm 1, biases and padded rows of the vocabulary 0.
    """

    config: ModelConfig
    seed: int
    pretrained: ClassVar[frozenset[str]] = frozenset()  # no parameter is

    def read(self, kind: str, run: SliceRun) -> torch.Tensor:
        """Return a run of a parameter's first weights ("weight"): float32 [length]."""
        if run.name.endswith("bias"):
            return torch.zeros(run.length)
        if len(run.shape) == 1:
            return torch.ones(run.length)

        return joined(
            [runs.within(self._drawn(run, runs.start, runs.end)) for runs in run.in_full()]
        )

    def _drawn(self, run: SliceRun, start: int, end: int) -> torch.Tensor:
        drawn = torch.from_numpy(draw_normal(self.seed, run.name, start, end - start))
        drawn *= self.config.initializer_range

        if run.name == "text_embedding.word.weight":
            words = self.config.vocab_size * run.full_shape[1]
            drawn[max(words - start, 0) :] = 0.0

        return drawn


@torch.no_grad()
def fill_model(
    model: nn.Module,
    read: Callable[[SliceRun], torch.Tensor],
    state: ParallelState,
    only: Collection[str] | None = None,
) -> None:
    """Fill the parameters of a model that holds its slices of them whole, part by part, in the
    dtype that they have; with `only`, those of these names.
    """
    for name, parameter in model.named_parameters():
        if only is not None and name not in only:
            continue

        flat = parameter.detach().view(-1)
        shape = tuple(parameter.shape)
        whole = SliceRun(name, shape, *place_of(name, state), 0, flat.numel())
        for run in whole.split(PART):
            flat[run.start : run.start + run.length] = read(run)


def initialise(model: nn.Module, config: ModelConfig, seed: int, state: ParallelState) -> None:
    """Fill a model with the first weights of `seed`."""
    first = FirstWeights(config, seed)
    fill_model(model, lambda run: first.read("weight", run), state)


def load_full_state(
    model: nn.Module,
    full: Mapping[str, torch.Tensor],
    state: ParallelState,
    where: str,
    partial: bool = False,
    may_lack: Sequence[str] = (),
) -> set[str]:
    """Copy this rank's slices of full tensors into the model; return the names that were loaded.

    Raises UsageError if names or shapes do not fit; see `check_names`.
    """
    shapes = {name: tensor.shape for name, tensor in full.items()}
    names = check_names(shapes, model, state, where, partial, may_lack)
    fill_model(model, lambda run: run.of(full[run.name].reshape(-1)), state, names)

    return names


def check_names(
    shapes: Mapping[str, Sequence[int]],
    model: nn.Module,
    state: ParallelState,
    where: str,
    partial: bool = False,
    may_lack: Sequence[str] = (),
) -> set[str]:
    """Return the names of the model's parameters that weights of these full shapes hold.

    Raises UsageError for a wrong shape, and for a missing parameter, unless `partial` or its name
    begins with one of `may_lack`.
    """
    there = set()

    for name, parameter in model.named_parameters():
        if name not in shapes:
            if partial or name.startswith(tuple(may_lack)):
                continue
            raise UsageError(
                f"{where}: parameter {name} is missing; the checkpoint is incomplete or of"
                " another model"
            )

        expected = full_shape(name, parameter.shape, place_of(name, state)[1])
        if list(shapes[name]) != expected:
            raise UsageError(
                f"{where}: {name} has shape {list(shapes[name])}, the model expects {expected};"
                " check --model and the vocabulary"
            )

        there.add(name)

    return there
