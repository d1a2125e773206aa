"""Test the bytes of collectives that arithmetic predicts against those that real ranks call, each
in its own process; tests/virtual/test_dry_run.py compares them with virtual ranks.
"""

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
    ],
    4: [
        {"zero_stage": 3},
        {"tensor_model_parallel_size": 2, "zero_stage": 2, "bf16": True},
        {"tensor_model_parallel_size": 2, "zero_stage": 3, "sequence_parallel": True},
        {"tensor_model_parallel_size": 4, "zero_stage": 1},
    ],
}


def count(changes: dict) -> None:
    """Train three steps in a layout, and compare the third step's bytes on this rank."""
    import torch

    from megatron_interbert.config.training import RunConfig
    from megatron_interbert.data.packing import pack
    from megatron_interbert.kernels.choice import Kernels
    from megatron_interbert.model.flops import Tokens
    from megatron_interbert.parallel.rng import RandomStreams
    from megatron_interbert.parallel.state import ParallelState
    from megatron_interbert.planning.traffic import step_traffic
    from megatron_interbert.tasks.pretraining import PretrainingTask
    from megatron_interbert.tasks.task import Job
    from megatron_interbert.training.micro_batch import layout_of
    from megatron_interbert.training.model_plan import ModelPlan, build_engine
    from megatron_interbert.virtual.rank import run_step
    from megatron_interbert.virtual.samples import random_examples
    from megatron_interbert.virtual.tracking import Tracker, Volumes

    config = RunConfig(micro_batch_size=3, global_batch_size=0, **changes)
    state = ParallelState(config.tensor_model_parallel_size, config.sequence_parallel)
    job = Job(PretrainingTask(), None, SIZES, ("msm", "mrm", "itm"), {}, "")
    plan = ModelPlan(job, state, Kernels(), 0, recompute=config.recompute_activations)
    streams = RandomStreams(0, state.data_rank, state.tensor_rank)
    engine = build_engine(plan, config, streams, torch.device("cpu"), plan.first_weights)
    examples = random_examples(SIZES, 3, (8, 20), (10, 30), seed=state.data_rank)
    batch = pack(examples, SIZES.feature_dim)
    groups = {state.tensor_group.group_name: "tensor", state.data_group.group_name: "data"}

    with Tracker(groups) as tracker:
        # DeepSpeed compares the order of ZeRO-3's gathers among ranks once, in the second step
        for _ in range(2):
            run_step(engine, job, [batch], streams)
        tracker.collectives.clear()
        run_step(engine, job, [batch], streams)

    layout = layout_of(config, state.data_size, Kernels())
    found = Volumes.of(tracker.collectives).bytes
    expected = step_traffic(SIZES, layout, [Tokens.of(batch)])
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
