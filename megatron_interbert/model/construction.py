"""Build models with memory for no more than is kept: on torch's meta device, which allocates
nothing, and then in the dtype of their passes.
"""

from collections.abc import Callable

import torch
from torch import nn

from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import copy_tags


def on_meta(make: Callable[[], InterBert]) -> InterBert:
    """Build a model without memory; the random state is left as it was."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return make()


def give_memory(
    model: nn.Module, device: torch.device, dtype: torch.dtype | None = None
) -> nn.Module:
    """Give memory to the parameters of a model on meta, in `dtype`, else in that of each, and
    return the model; a model with memory only moves to the device.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return model.to(device)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device=device)
                filled = nn.Parameter(empty)
                copy_tags(parameter, filled)
                setattr(module, name, filled)

    return model
