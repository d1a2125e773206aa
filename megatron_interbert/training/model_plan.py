"""Plan and build a run's models, and the engine around the one to train."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.kernels.choice import Kernels, choose_kernels
from megatron_interbert.model.construction import give_memory, on_meta
from megatron_interbert.model.initialise import FirstWeights, initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.routing_groups import RoutingRule
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.deepspeed_config import refuse_secondary_partition
from megatron_interbert.training.engine import Engine, engine_settings
from megatron_interbert.training.first_weights import InitialWeights
from megatron_interbert.training.fragments import FragmentedState
from megatron_interbert.training.sharding import sharded_model
from megatron_interbert.training.update import shards_weights

TRIED_LAYERS = 2


@dataclass(frozen=True)
class ModelPlan:
    """Build the models of one run, all with the same sizes, heads and kernels."""

    job: Job
    state: ParallelState
    kernels: Kernels
    seed: int
    recompute: bool
    rule: RoutingRule | None = None

    def make(self, streams: RandomStreams | None = None) -> InterBert:
        """Build the model to train; see model/construction.py for its memory."""
        return InterBert(
            self.job.model_config,
            self.job.heads,
            state=self.state,
            kernels=self.kernels,
            streams=streams,
            recompute=self.recompute,
            rule=self.rule,
            **self.job.model_options,
        )

    def without_memory(self) -> InterBert:
        """Build the model for the names and shapes of its parameters."""
        return on_meta(self.make)

    def whole(self, streams: RandomStreams, device: torch.device, dtype: torch.dtype) -> InterBert:
        """Build the model with this rank's whole tensor-parallel slice, not filled."""
        return give_memory(on_meta(lambda: self.make(streams)), device, dtype)

    def filled(self, streams: RandomStreams, device: torch.device, dtype: torch.dtype) -> InterBert:
        """Build the model with this rank's whole slice and its first weights."""
        model = self.whole(streams, device, dtype)
        initialise(model, self.job.model_config, self.seed, self.state)
        return model

    def shallow(self) -> "ModelPlan":
        """Return the plan of a model of at most TRIED_LAYERS layers in each stack, for trials where
        no rank can hold the whole: their passes gain from larger batches as those of all layers do.
        """
        sizes = self.job.model_config
        names = ("interaction_layers", "text_layers", "image_layers")
        layers = {name: min(TRIED_LAYERS, getattr(sizes, name)) for name in names}
        job = replace(self.job, model_config=replace(sizes, **layers))

        return replace(self, job=job)

    def for_evaluation(self) -> InterBert:
        """Build a model to copy weights into, without memory yet, with whole rows and all experts:
        evaluations call single layers, and not all ranks as often.
        """
        state = self.state.for_evaluation()
        return replace(self, state=state, recompute=False).without_memory()

    @property
    def first_weights(self) -> FirstWeights:
        """Return what draws the weights that the model starts from."""
        return FirstWeights(self.job.model_config, self.seed)


def plan_model(
    config: TrainConfig, job: Job, state: ParallelState, device: torch.device
) -> ModelPlan:
    """Choose the kernels of a run's model; UsageError if sizes, ranks and precision do not fit."""
    sizes = job.model_config
    sizes.check_tensor_parallel(state.tensor_size)
    sizes.check_expert_parallel(state.expert_size)
    config.check_float8(sizes)
    rule = routing_rule(config, sizes, state)
    if sizes.experts:
        refuse_secondary_partition(config)
        state.make_expert_groups()

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

    return ModelPlan(job, state, kernels, config.seed, config.recompute_activations, rule)


def routing_rule(config: TrainConfig, sizes: ModelConfig, state: ParallelState) -> RoutingRule:
    """Return what limits and balances the load of experts; only pretraining has flags for that.

    Raises UsageError if these are given for a model without experts.
    """
    if not isinstance(config, RunConfig):
        return RoutingRule()

    config.check_routing(sizes)
    partitions = config.data_partitions // state.data_size

    return RoutingRule(
        config.capacity_factor, config.balance_coefficient > 0, config.routing_group, partitions
    )


def working_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype in which a run's layers compute."""
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else torch.float32


def build_model(
    plan: ModelPlan,
    config: TrainConfig,
    streams: RandomStreams,
    device: torch.device,
    settings: dict[str, Any] | None = None,
) -> InterBert:
    """Build the model to train with memory for what this rank keeps of it, not filled; `settings`
    are DeepSpeed's.
    """
    settings = settings or engine_settings(config, plan.state, plan.without_memory())
    if shards_weights(config, plan.state, settings):
        make = functools.partial(plan.make, streams)
        return sharded_model(make, device, plan.state, settings)

    return plan.whole(streams, device, working_dtype(config))


def build_engine(
    plan: ModelPlan,
    config: TrainConfig,
    streams: RandomStreams,
    device: torch.device,
    weights: FirstWeights | InitialWeights,
    settings: dict[str, Any] | None = None,
    fill: bool = True,
) -> Engine:
    """Build the model to train and the engine around it, and fill in the weights to start from,
    unless a checkpoint is to do so; `settings` are DeepSpeed's.
    """
    settings = settings or engine_settings(config, plan.state, plan.without_memory())
    model = build_model(plan, config, streams, device, settings)
    engine = Engine(model, config, plan.state, weights.pretrained, settings)
    if fill:
        FragmentedState(engine).fill_weights(weights)

    return engine
