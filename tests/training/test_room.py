"""Test that a run that cannot fit its memory is refused before anything is built, with the nearest
layout that fits.
"""

import dataclasses
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch import nn

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.planning.layout import BUCKET, PREFETCH, Layout, Load
from megatron_interbert.planning.memory import Memory, predict
from megatron_interbert.planning.search import (
    SHIPPED,
    Fit,
    Room,
    flags_of,
    json_key,
    nearby_fits,
    nearby_layouts,
    nearest_fit,
)
from megatron_interbert.training import room as training_room
from megatron_interbert.training.engine import engine_settings
from megatron_interbert.training.micro_batch import layout_of
from megatron_interbert.training.room import alternatives, changes
from tests.launching import ROOT, ends, launch, pretrain, start_ranks
from tests.sizes import MEASURABLE

GIB = 2**30
LARGE = dataclasses.replace(MEASURABLE, hidden_size=1024, ffn_hidden_size=4096, text_layers=12)
# a model of 100 B parameters, which no machine holds that tests run on
HUGE = {
    "hidden_size": 16384,
    "ffn_hidden_size": 65536,
    "num_attention_heads": 32,
    "image_attention_heads": 32,
    "interaction_layers": 30,
    **dict.fromkeys(ModelConfig.FROM_DATA, 0),
}


def nearest(layout: Layout, room: Room, samples: int = 32, sizes: ModelConfig = LARGE) -> str:
    """Return the flags to change, after checking that they make the run fit."""
    load = Load(samples)
    assert room.shortage(predict(sizes, layout, load))
    found = nearest_fit(sizes, layout, load, room, samples)
    if found is None:
        return ""

    assert not room.shortage(
        predict(sizes, found.layout, dataclasses.replace(load, samples=found.samples))
    )
    assert found.samples * found.steps * found.layout.data == samples * layout.data
    return " ".join(flags_of(found, layout, samples))


def test_the_nearest_layout_changes_least() -> None:
    whole = predict(LARGE, Layout(4, half=True), Load(1))
    assert nearest(Layout(4, half=True), Room(whole.peak - 1), samples=1) == "--zero-stage 2"

    wide = dataclasses.replace(LARGE, hidden_size=4096, ffn_hidden_size=16384)  # 4 B parameters
    whole = predict(wide, Layout(16, half=True), Load(1))
    room = Room(0.6 * whole.peak)
    assert nearest(Layout(16, half=True), room, samples=1, sizes=wide) == "--zero-stage 3"
    # one rank has nothing to share: the host takes the optimizer, or the disk
    alone = Layout(half=True)
    needed = predict(LARGE, alone, Load(32))
    some = Room(0.4 * needed.peak, host=1e12)
    assert nearest(alone, some) == "--deepspeed-config zero2_offload_optimizer"
    on_a_cpu = Room(0.5 * predict(wide, alone, Load(1)).peak, disk=1e12, one_memory=True)
    flags = nearest(alone, on_a_cpu, samples=1, sizes=wide)
    assert flags == "--deepspeed-config zero3_nvme_optimizer --nvme-path FOLDER"
    assert nearest(alone, Room(0.01 * needed.peak)) == ""


def test_offload_of_any_kind_can_be_refused() -> None:
    """Take combinations that a JSON may have and that are not among those searched."""
    for optimizer, parameters in (("none", "cpu"), ("nvme", "cpu"), ("cpu", "nvme")):
        layout = Layout(4, half=True, zero_stage=3)
        layout = dataclasses.replace(layout, optimizer_on=optimizer, parameters_on=parameters)
        room = Room(predict(LARGE, layout, Load(8)).peak, host=1e12, disk=1e12)
        flags = nearest(layout, room, samples=256)
        assert flags.startswith(("--recompute-activations", "--micro-batch-size")), flags
        assert "--deepspeed-config" not in flags, "what it has is enough"


def test_the_same_layout_with_fewer_samples() -> None:
    """Check that layouts that a search does not list are their own neighbours."""
    for stage in (2, 3):
        layout = Layout(half=True, zero_stage=stage)
        room = Room(predict(LARGE, layout, Load(64)).peak)
        flags = nearest(layout, room, samples=512)
        assert flags.startswith(("--recompute-activations", "--micro-batch-size")), flags


def test_weights_that_a_node_holds_once_more(tmp_path) -> None:
    """Check that the advice leaves secondary partitions out before it changes anything else."""
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "max_reuse_distance": 10**10}
    file.write_text(json.dumps({"zero_optimization": zero}))
    config = RunConfig(deepspeed_config=str(file), zero_stage=3, bf16=True, micro_batch_size=8)
    layout = layout_of(config, 4, Kernels())
    assert (layout.secondary, layout.live) == (2, 5 * 10**9), "what is kept for its next use"

    layout = replace(layout, live=10**7)
    room = Room(predict(LARGE, replace(layout, secondary=0), Load(8)).peak)
    assert room.shortage(predict(LARGE, layout, Load(8)))
    found = nearest_fit(LARGE, layout, Load(8), room, 8)
    trial = SimpleNamespace(config=config, layout=layout)
    assert changes(trial, found) == f"without zero_hpz_partition_size in {file}"

    for other in nearby_layouts(LARGE, layout, has_bf16=True):
        assert not (other.secondary and (other.tensor > 1 or other.offloads)), other


def test_what_deepspeeds_json_says_counts(tmp_path) -> None:
    """Check that a run that gathers little at a time is not refused for what others gather."""
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "stage3_max_live_parameters": 1e7, "reduce_bucket_size": 1_000_000}
    zero |= {"stage3_prefetch_bucket_size": "auto", "sub_group_size": 2_000_000}
    file.write_text(json.dumps({"zero_optimization": zero}))
    config = RunConfig(deepspeed_config=str(file), zero_stage=3, bf16=True, micro_batch_size=1)
    layout = layout_of(config, 4, Kernels())
    assert (layout.live, layout.bucket, layout.sub_group) == (1e7, 1_000_000, 2_000_000)
    assert layout.prefetch == PREFETCH
    settings = engine_settings(config, SimpleNamespace(data_size=4), nn.Linear(1, 1))
    assert settings["zero_optimization"]["stage3_max_reuse_distance"] == 2e7

    usual = predict(LARGE, Layout(4, zero_stage=3, half=True), Load(1)).peak
    assert predict(LARGE, layout, Load(1)).peak < 0.75 * usual


def test_rows_that_are_not_samples() -> None:
    """Check a micro-batch of 8 samples with 4 rows each, as retrieval has them."""
    layout = Layout(2, half=True, zero_stage=3)
    room = Room(1.2 * predict(LARGE, layout, Load(4)).peak)
    found = nearest_fit(LARGE, layout, Load(32), Room(room.device), 8)
    assert found is not None
    assert 8 % found.samples == 0
    assert not room.shortage(predict(LARGE, found.layout, Load(4 * found.samples)))


def test_16_bits_before_offload() -> None:
    """Check that a run in fp32 is told of bf16 where the device has it."""
    layout = Layout(2, zero_stage=3)
    room = Room(0.9 * predict(LARGE, layout, Load(1)).peak, host=1e12)
    load = Load(1)
    with_offload = nearest_fit(LARGE, layout, load, room, 1)
    in_16_bits = nearest_fit(LARGE, layout, load, room, 1, has_bf16=True)
    assert "--deepspeed-config" in " ".join(flags_of(with_offload, layout, 1))
    assert flags_of(in_16_bits, layout, 1) == ["--bf16"]

    others = nearby_fits(LARGE, layout, load, 1, has_bf16=True)
    smallest = min(others, key=lambda one: room.filled(one.memory))
    places = (smallest.layout.optimizer_on, smallest.layout.parameters_on)
    assert (places, smallest.layout.half) == (("cpu", "cpu"), True)


def test_another_stage_keeps_the_offload() -> None:
    """Check that a stage that another shipped JSON has is named by it, and its numbers count."""
    layout = Layout(4, zero_stage=2, half=True, optimizer_on="cpu", swap_buffers=64, bucket=10**9)
    found = Fit(replace(layout, zero_stage=3, swap_buffers=4), 1, 1, Memory(*[0.0] * 6))
    assert flags_of(found, layout, 1) == ["--deepspeed-config", "zero3_offload_optimizer"]

    for other in nearby_layouts(LARGE, layout, has_bf16=True):
        own = json_key(other) == json_key(layout)
        assert own or not other.offloads or (other.swap_buffers, other.bucket) == (4, BUCKET)


def test_the_shipped_files_are_as_they_are_named() -> None:
    for (optimizer, parameters, stage), name in SHIPPED.items():
        zero = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())["zero_optimization"]
        there = [zero.get(f"offload_{what}", {}) for what in ("optimizer", "param")]
        assert [block.get("device", "none") for block in there] == [optimizer, parameters], name
        assert zero["stage"] == stage, name


def test_fewer_ranks_of_a_machine_may_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that fewer ranks are tried only where all share one machine, with more of it each; what
    is said to fit leaves 5 % free.
    """
    layout = Layout(4, tensor=2)
    room = Room(8.0, 8.0, one_memory=True)
    launch = SimpleNamespace(local_size=8)
    monkeypatch.setattr(training_room, "read_launch", lambda: launch)
    first, second, *fewer = alternatives(layout, room)
    assert first[1:] == (layout, Room(7.6, 7.6, one_memory=True))
    assert second[2].device > room.device
    assert [(found.data, there.device) for _, found, there in fewer] == [(2, 15.2), (1, 30.4)]
    assert fewer[1][0] == "2 ranks instead of 8 fit with"

    _, _, *fewer = alternatives(replace(layout, expert=8), room)
    assert [found.expert for _, found, _ in fewer] == [4, 2]

    launch.local_size = 4
    assert len(list(alternatives(layout, room))) == 2


def test_activations_that_are_too_large_make_smaller_micro_batches() -> None:
    layout = Layout(2, half=True, zero_stage=3)
    states = predict(LARGE, layout, Load(1)).peak
    assert nearest(layout, Room(1.2 * states), samples=64).startswith("--micro-batch-size")


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("sizes") / "huge.json"
    file.write_text(json.dumps(HUGE))

    return str(file)


def test_a_run_that_cannot_fit_is_one_line(store, huge: str, tmp_path) -> None:
    """Check one rank and two: exit code 2 in seconds, one line, nothing written."""
    flags = ("--data-path", store, "--model", huge, "--bf16", "--train-iters", 1)
    flags = (*flags, "--save", tmp_path / "run", "--micro-batch-size", 4)
    refused = [launch(*pretrain(*flags)), *ends(start_ranks(flags, flags))]
    for code, out, err in refused:
        assert code == 2, out + err
        [line] = [line for line in err.splitlines() if line.startswith("error")]
        assert "memory: rank 0 needs " in line
        assert "GiB (optimizer " in line
        assert "no layout of these ranks fits: --" in line
        assert " GiB; use more devices, or a smaller model" in line
        assert "Traceback" not in err

    assert not (tmp_path / "run").exists()
