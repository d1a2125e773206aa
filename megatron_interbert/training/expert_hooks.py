"""Tell DeepSpeed about experts: their groups, and that the model has any.

DeepSpeed's own layer for experts routes within a rank's batch and does not work at ZeRO stage 3, so
experts here are ours (model/experts.py), and DeepSpeed (0.19) only sums their gradients and shares
their state over the expert-data group. It finds out which parameters those are from their tags
(ParallelState.expert_parameter), the groups from its own tables, and that there are any from the
type of a submodule.
"""

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn

from megatron_interbert.parallel.state import ParallelState


class ExpertMarker(AutoEPMoELayer):
    """Represent no layer: its type alone tells DeepSpeed that a model has experts."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.num_experts = 0  # DeepSpeed reads it only for checkpoints of its own

    def set_deepspeed_parallelism(self, *_: object, **__: object) -> None:
        """Do nothing: the groups exist already."""


def announce_experts(model: nn.Module, state: ParallelState) -> None:
    """Enter the groups of experts in DeepSpeed's tables and mark the model, if it has experts whose
    gradients are summed over other ranks than those of its other parameters.
    """
    if not any(has_expert_tags(parameter) for parameter in model.parameters()):
        return

    name = state.expert_group_name
    first = state.rank - state.expert_rank
    groups._EXPERT_PARALLEL_GROUP[name] = state.expert_group
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = range(first, first + state.expert_size)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = state.expert_data_group
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = range(
        state.expert_rank, state.world_size, state.expert_size
    )
    model.expert_marker = ExpertMarker()


def has_expert_tags(parameter: nn.Parameter) -> bool:
    """Check whether a parameter has the tags of experts (ParallelState.expert_parameter)."""
    return not getattr(parameter, "allreduce", True)
