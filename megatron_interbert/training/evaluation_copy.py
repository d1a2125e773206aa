"""Copy the weights in training into a model to evaluate."""

import torch

from megatron_interbert.model.construction import give_memory
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.shared_weights import MeetingState, SharedWeights
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.planning.layout import ON_DEVICE, keeps_parts
from megatron_interbert.training.deepspeed_config import offload_blocks
from megatron_interbert.training.engine import Engine
from megatron_interbert.training.fragments import FragmentedState


class EvaluationCopy:
    """Hold a model to evaluate, and the ranks that evaluate it.

    Each data-parallel rank has the whole (its tensor-parallel slice) or, with `weights`, its part,
    and gathers what it reads.
    """

    def __init__(
        self, model: InterBert, state: ParallelState, weights: SharedWeights | None = None
    ) -> None:
        self.model = model.eval()
        self.state = MeetingState.of(state, weights) if weights else state
        self.weights = weights

    def take(self, trained: FragmentedState, kind: str) -> None:
        """Take the weights (`kind` "weight") or their average ("ema"); call it on all ranks."""
        if self.weights:
            trained.copy_parts(self.weights.parts, kind)
        else:
            trained.copy_into(self.model, kind)

    def finish(self) -> None:
        """Wait for the other ranks, and free what only an evaluation needs."""
        if self.weights:
            self.weights.finish()
            self.weights.drop()


def copy_for_evaluation(model: InterBert, engine: Engine, device: torch.device) -> EvaluationCopy:
    """Give memory to a model on torch's meta device, in the precision of the evaluation: in parts
    where DeepSpeed keeps the weights in parts (ZeRO stage 3), and where it keeps them.
    """
    state = engine.state
    offload = offload_blocks(engine.deepspeed_config)["offload_param"]
    kept_on = offload.get("device", ON_DEVICE)
    if not keeps_parts(engine.update.stage, state.data_size, kept_on):
        return EvaluationCopy(give_memory(model, device), state)

    most = engine.deepspeed.zero_max_live_parameters()
    place = device if kept_on == ON_DEVICE else torch.device("cpu")

    return EvaluationCopy(model, state, SharedWeights(model, state, device, most, place))
