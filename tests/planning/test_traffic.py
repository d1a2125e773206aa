"""Test the bytes of collectives that arithmetic predicts against those that real ranks call, each
in its own process; tests/virtual/test_dry_run.py compares them with virtual ranks.
"""

from collections import Counter

import pytest

from tests.dist import run_on_ranks
from tests.sizes import FOR_EIGHT_RANKS as SIZES

LAYOUTS = {
    2: [
        {"zero_stage": 0},
        {"zero_stage": 1, "bf16": True},
        {"zero_stage": 2, "bf16": True},
        {"zero_stage": 3, "bf16": True},
        {"tensor_model_parallel_size": 2, "bf16": True, "zero_stage": 1},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"tensor_model_parallel_size": 2, "recompute_activations": True},
        {"expert_parallel_size": 2, "zero_stage": 0},
        {"tensor_model_parallel_size": 2, "experts": 8, "bf16": True, "zero_stage": 1},
        {"tensor_model_parallel_size": 2, "expert_parallel_size": 2, "sequence_parallel": True},
    ],
    4: [
        {"zero_stage": 3},
        {"tensor_model_parallel_size": 2, "zero_stage": 2, "bf16": True},
        {"tensor_model_parallel_size": 2, "zero_stage": 3, "sequence_parallel": True},
        {"tensor_model_parallel_size": 4, "zero_stage": 1},
        {"expert_parallel_size": 2, "zero_stage": 2, "bf16": True},
        {"expert_parallel_size": 4, "zero_stage": 1, "recompute_activations": True},
        {"tensor_model_parallel_size": 2, "expert_parallel_size": 4, "zero_stage": 1},
        {
            "tensor_model_parallel_size": 2,
            "expert_parallel_size": 2,
            "sequence_parallel": True,
            "recompute_activations": True,
        },
    ],
}


def count(changes: dict) -> None:
    """Train three steps in a layout, and compare the third step's bytes on this rank."""
    import torch

    from megatron_interbert.config.pretraining import RunConfig
    from megatron_interbert.data.packing import pack
    from megatron_interbert.kernels.choice import Kernels
    from megatron_interbert.model.flops import Tokens
    from megatron_interbert.model.presets import with_experts
    from megatron_interbert.parallel.rng import RandomStreams
    from megatron_interbert.parallel.state import ParallelState
    from megatron_interbert.planning.traffic import step_traffic
    from megatron_interbert.tasks.pretraining.task import PretrainingTask
    from megatron_interbert.tasks.task import Job
    from megatron_interbert.training.micro_batch import layout_of
    from megatron_interbert.training.model_plan import ModelPlan, build_engine
    from megatron_interbert.virtual.rank import VirtualState, run_step
    from megatron_interbert.virtual.samples import random_examples
    from megatron_interbert.virtual.tracking import Tracker, Volumes

    config = RunConfig(micro_batch_size=3, global_batch_size=0, **changes)
    experts = config.experts or (8 if config.expert_parallel_size > 1 else 0)
    sizes = with_experts(SIZES, experts, 2 if experts else 0)
    state = ParallelState(
        config.tensor_model_parallel_size,
        config.sequence_parallel,
        expert_parallel_size=config.expert_parallel_size,
    )
    if experts:
        state.make_expert_groups()
    job = Job(PretrainingTask(), None, sizes, ("msm", "mrm", "itm"), {}, "")
    plan = ModelPlan(job, state, Kernels(), 0, recompute=config.recompute_activations)
    streams = RandomStreams(0, state.data_rank, state.tensor_rank)
    engine = build_engine(plan, config, streams, torch.device("cpu"), plan.first_weights)
    examples = random_examples(SIZES, 3, (8, 20), (10, 30), seed=state.data_rank)
    batch = pack(examples, SIZES.feature_dim)

    with Tracker(VirtualState.names.fget(state)) as tracker:
        # DeepSpeed compares the order of ZeRO-3's gathers among ranks once, in the second step
        for _ in range(2):
            run_step(engine, job, [batch], streams)
        tracker.collectives.clear()
        run_step(engine, job, [batch], streams)

    layout = layout_of(config, state.data_size, Kernels())
    # of all ranks together: what they send to experts depends on the content of their tokens
    found, expected = (
        sum(state.gather(one), Counter())
        for one in (
            Volumes.of(tracker.collectives).bytes,
            step_traffic(sizes, layout, [Tokens.of(batch)]),
        )
    )
    assert dict(found) == pytest.approx(dict(expected), rel=1e-9), (changes, found, expected)
    assert sum(found.values()) > 10_000, changes


def count_all(ranks: int) -> None:
    from megatron_interbert.machines.processes import start_processes

    start_processes()
    for changes in LAYOUTS[ranks]:
        count(changes)


@pytest.mark.parametrize("ranks", [2, 4])
def test_real_ranks_exchange_what_is_predicted(ranks: int) -> None:
    run_on_ranks(ranks, count_all, ranks)
