"""Test options of ZeRO that a DeepSpeed JSON switches: losses and checkpoints are as without them,
or the options are refused with a reason.
"""

import json
from pathlib import Path

import pytest
from deepspeed.utils import groups

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.training.deepspeed_config import merge
from tests.dist import run_on_ranks
from tests.sizes import SMALL
from tests.training.test_swap import LAST, SAVED, Run, check_close

OPTIONS = {
    "plain": {},
    "overlap": {"overlap_comm": True},
    "secondary": {  # each pair of ranks holds all weights once more, and gathers most from there
        "zero_hpz_partition_size": 2,
        "stage3_max_live_parameters": 10_000,
        "stage3_param_persistence_threshold": 0,
    },
}


def compare(folder: str) -> None:
    """Train, save and resume at each stage with each option."""
    from megatron_interbert.machines.processes import start_processes

    start_processes()
    for stage in (1, 2, 3):
        undisturbed = {}
        for name in OPTIONS:
            if name == "secondary" and stage < 3:
                continue

            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of an engine before this one
            run = Run(folder, f"{stage}-{name}", name, stage=stage, sizes=SMALL)
            check_secondary(run, name)
            before = run.train(SAVED)
            run.save()
            undisturbed[name] = before + run.train(LAST)

            if name == "plain":  # tests/training/test_topologies.py resumes it
                continue

            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
            path = f"{folder}/{stage}-{name}/global_step{SAVED}"
            again = f"{stage}-{name}-again"
            resumed = Run(folder, again, name, load=path, stage=stage, sizes=SMALL)
            assert resumed.train(LAST) == undisturbed[name][SAVED:], (stage, name)

        for results in undisturbed.values():
            check_close(results, undisturbed["plain"], of_norm=2**-8)  # a rounding of bfloat16
            # at stage 1 DeepSpeed sums gradients in another order if it overlaps them
            assert stage == 1 or results == undisturbed["plain"], stage


def check_secondary(run: Run, name: str) -> None:
    """Check that a forward pass leaves secondary parts behind with that option alone."""
    from megatron_interbert.data.packing import pack
    from megatron_interbert.virtual.samples import random_examples

    batch = pack(random_examples(SMALL, 2, (8, 20), (10, 36)), SMALL.feature_dim)
    run.engine.forward(batch)
    parameters = run.engine.model.parameters()
    parts = [p for p in parameters if getattr(p, "ds_secondary_tensor", None) is not None]
    assert bool(parts) == (name == "secondary"), name


def test_options_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("x\n")
    for name, option in OPTIONS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"zero_optimization": option}))

    run_on_ranks(4, compare, str(tmp_path))


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_quantised_communication_is_refused(tmp_path: Path, key: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, key: True}}))
    config = RunConfig(deepspeed_config=str(file), bf16=True, micro_batch_size=1)
    with pytest.raises(UsageError, match=f"{key} is not supported: DeepSpeed rounds with a CUDA"):
        merge(config, 1)


def test_secondary_groups_must_divide_ranks_with_the_same_weights(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}))
    config = RunConfig(deepspeed_config=str(file), bf16=True, micro_batch_size=1)
    with pytest.raises(UsageError, match="zero_hpz_partition_size 3 does not divide the 4 data-"):
        merge(config, 4)

    far = {"stage": 3, "zero_hpz_partition_size": 2, "offload_param": {"device": "cpu"}}
    (tmp_path / "far.json").write_text(json.dumps({"zero_optimization": far}))
    offloaded = RunConfig(
        deepspeed_config=str(tmp_path / "far.json"), bf16=True, zero_stage=3, micro_batch_size=1
    )
    with pytest.raises(UsageError, match="offload_param moves them off; leave one of them out"):
        merge(offloaded, 4)

    merge(config, 6)
    merge(config, 2)  # fewer ranks are one group, as DeepSpeed has it
    config.tensor_model_parallel_size = 2
    with pytest.raises(UsageError, match="zero_hpz_partition_size needs --tensor-model-parallel"):
        merge(config, 6)
