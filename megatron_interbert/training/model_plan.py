"""Plan and build a run's models: sizes, heads, kernels, random streams."""

from dataclasses import dataclass

import torch

from megatron_interbert.config.training import TrainConfig
from megatron_interbert.kernels.choice import Kernels, choose_kernels
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.task import Job


@dataclass(frozen=True)
class ModelPlan:
    """Build the models of one run, all with the same sizes, heads and kernels."""

    job: Job
    state: ParallelState
    kernels: Kernels
    seed: int
    recompute: bool

    def with_first_weights(self, streams: RandomStreams) -> InterBert:
        """Build the model to train, on the CPU, with initial weights drawn from --seed."""
        sizes = self.job.model_config
        model = InterBert(
            sizes,
            self.job.heads,
            state=self.state,
            kernels=self.kernels,
            streams=streams,
            recompute=self.recompute,
            **self.job.model_options,
        )
        initialise(model, sizes, self.seed, self.state)

        return model

    def for_evaluation(self) -> InterBert:
        """Build a model to copy weights into, with whole rows: evaluations call single layers."""
        return InterBert(
            self.job.model_config,
            self.job.heads,
            state=self.state.with_replicated_rows(),
            kernels=self.kernels,
            **self.job.model_options,
        )


def plan_model(
    config: TrainConfig, job: Job, state: ParallelState, device: torch.device
) -> ModelPlan:
    """Choose the kernels of a run's model; UsageError if sizes, ranks and precision do not fit."""
    sizes = job.model_config
    sizes.check_tensor_parallel(state.tensor_size)
    config.check_float8(sizes)

    dropout = max(sizes.attention_dropout, sizes.image_attention_dropout) > 0
    kernels = choose_kernels(
        config.kernels,
        device,
        dropout,
        config.deterministic,
        config.fp8,
        sizes.head_sizes,
        working_dtype(config),
    )

    return ModelPlan(job, state, kernels, config.seed, config.recompute_activations)


def working_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype in which a run's layers compute."""
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else torch.float32
