"""Copy the weights in training into a model to evaluate: whole on every data-parallel rank, or
shared among them where training shares them too.
"""

from typing import Protocol

import torch

from megatron_interbert.model.construction import give_memory
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.shared_weights import MeetingState, SharedWeights
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.planning.layout import ON_DEVICE
from megatron_interbert.training.deepspeed_config import offload_blocks
from megatron_interbert.training.engine import Engine
from megatron_interbert.training.fragments import FragmentedState


class Copy(Protocol):
    """Hold a model to evaluate and the ranks that evaluate it."""

    model: InterBert
    state: ParallelState

    def take(self, trained: FragmentedState, kind: str) -> None:
        """Take the weights (`kind` "weight") or their average ("ema"); call it on all ranks."""

    def finish(self) -> None:
        """Let the other ranks finish their work, and give back what only work needs."""


class WholeCopy:
    """Hold a copy whole (this rank's tensor-parallel slice); takes a model on torch's meta device,
    or one with memory.
    """

    def __init__(self, model: InterBert, state: ParallelState, device: torch.device) -> None:
        self.model = give_memory(model, device).eval()
        self.state = state

    def take(self, trained: FragmentedState, kind: str) -> None:
        trained.copy_into(self.model, kind)

    def finish(self) -> None:
        pass


class SharedCopy:
    """Hold this rank's part of a copy, for ZeRO stage 3; ranks gather weights when they read them.
    Takes a model on torch's meta device. See parallel/shared_weights.py.
    """

    def __init__(
        self,
        model: InterBert,
        state: ParallelState,
        device: torch.device,
        most: int,
        kept_on: torch.device,
    ) -> None:
        self.weights = SharedWeights(model, state, device, most, kept_on)
        self.model = model.eval()
        self.state = MeetingState(state, self.weights)

    def take(self, trained: FragmentedState, kind: str) -> None:
        trained.copy_parts(self.weights.parts, kind)

    def finish(self) -> None:
        self.weights.finish()


def copy_for_evaluation(model: InterBert, engine: Engine, device: torch.device) -> Copy:
    """Choose the kind of copy for an engine: `model` is on torch's meta device and in the precision
    of the evaluation.
    """
    if engine.update.stage < 3:
        return WholeCopy(model, engine.state, device)

    most = engine.deepspeed.zero_max_live_parameters()
    offload = offload_blocks(engine.deepspeed_config)["offload_param"]
    kept_on = device if offload.get("device", ON_DEVICE) == ON_DEVICE else torch.device("cpu")

    return SharedCopy(model, engine.state, device, most, kept_on)
