"""Draw a model's first weights by parameter name, the same for every layout, or load given ones."""

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.model.partition import full_shape, shard
from megatron_interbert.parallel.state import ParallelState


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int, state: ParallelState) -> None:
    """Draw matrices from N(0, initializer_range); set LayerNorm gains to 1, biases and padded
    vocabulary rows to 0.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            # torch uses only the lower 32 bits of a seed
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            full = torch.empty(full_shape(name, parameter.shape, state.tensor_size))
            full.normal_(0.0, config.initializer_range, generator=generator)
            if name == "text_embedding.word.weight":
                full[config.vocab_size :] = 0.0
            parameter.copy_(shard(full, name, state.tensor_rank, state.tensor_size))


@torch.no_grad()
def load_full_state(
    model: nn.Module,
    full: Mapping[str, torch.Tensor],
    state: ParallelState,
    where: str,
    partial: bool = False,
    may_lack: Sequence[str] = (),
) -> set[str]:
    """Copy this rank's slices of full tensors into the model; return the names that were loaded.

    Raises UsageError for a wrong shape, and for a missing parameter, unless `partial` or its name
    begins with one of `may_lack`.
    """
    loaded = set()

    for name, parameter in model.named_parameters():
        if name not in full:
            if partial or name.startswith(tuple(may_lack)):
                continue
            raise UsageError(
                f"{where}: parameter {name} is missing; the checkpoint is incomplete or of"
                " another model"
            )

        expected = full_shape(name, parameter.shape, state.tensor_size)
        if list(full[name].shape) != expected:
            raise UsageError(
                f"{where}: {name} has shape {list(full[name].shape)}, the model expects {expected};"
                " check --model and the vocabulary"
            )

        parameter.copy_(shard(full[name], name, state.tensor_rank, state.tensor_size))
        loaded.add(name)

    return loaded
