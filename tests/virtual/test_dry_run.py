"""Test the dry run: its memory against the planner's, its collectives against a run on real ranks,
what all ranks save, and that ranks which would wait for each other for ever are found.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_interbert import dry_run
from megatron_interbert.config.options import AUTO
from megatron_interbert.dry_run import DryRunConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.planning.layout import largest_parameter
from megatron_interbert.virtual import rank as virtual_rank
from megatron_interbert.virtual.comparison import find_hang, missing_or_double
from megatron_interbert.virtual.rank import Rehearsal, one_of
from megatron_interbert.virtual.tracking import Collective
from tests.campaigns.virtual_ranks import outlines_of
from tests.corpus import write_store
from tests.sizes import MEASURABLE

# preset -> (ranks, expert-parallel size, ZeRO stage)
WITH_EXPERTS = {
    "m6-1.4b": (8, 8, 1),
    "m6-10b": (64, 64, 1),
    "m6-100b": (128, 128, 1),
    "m6-1t": (512, 64, 2),
}
NORM = 16  # bytes in which the norm of gradients that are offloaded or in fp16 may differ


def sizes_file(folder: Path) -> str:
    """Write sizes large enough for weights to stand out, with those of the data left open."""
    file = folder / "sizes.json"
    sizes = {**dataclasses.asdict(MEASURABLE), "vocab_size": 0, "feature_dim": 0, "num_classes": 0}
    file.write_text(json.dumps(sizes))

    return str(file)


def rehearse(folder: Path, **changes) -> dict:
    """Run the dry run of a small store; return its figures."""
    settings = {
        "world_size": 4,
        "ranks": "all",
        "tensor_model_parallel_size": 2,
        "bf16": True,
        "zero_stage": 1,
        "micro_batch_size": 4,
        "model": sizes_file(folder),
        "data_path": str(folder / "store"),
        "output": str(folder / "figures.json"),
        **changes,
    }
    config = DryRunConfig()
    for name, value in settings.items():
        setattr(config, name, value)
        config.given.add(name)

    config.check()
    dry_run.dry_run(config)

    return json.loads((folder / "figures.json").read_text())


def rehearse_preset(folder: Path, preset: str) -> dict:
    """Rehearse the last rank of a run of a preset with experts; return its figures."""
    ranks, expert, stage = WITH_EXPERTS[preset]
    figures = rehearse(
        folder,
        model=preset,
        data_path="",
        words=(12, 16),
        world_size=ranks,
        ranks=str(ranks - 1),
        micro_batch_size=16,
        expert_parallel_size=expert,
        tensor_model_parallel_size=1,
        zero_stage=stage,
    )
    [one] = figures["ranks"]

    return one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a store.

    Rehearses both kinds of engine in this process first: those of the tests are forked from it, and
    inherit what torch caches about fake tensors.
    """
    folder = tmp_path_factory.mktemp("dry_run")
    write_store(folder / "store")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "rehearse_all", lambda config: [dry_run.rehearse_rank((config, 0))])
        for stage in (1, 3):
            rehearse(folder, ranks="0", zero_stage=stage)

    return folder


@pytest.mark.parametrize(
    ("stage", "ranks", "half"), [(1, "all", "bf16"), (2, "0", "fp16"), (3, "3", "bf16")]
)
def test_a_sound_run(
    folder: Path, stage: int, ranks: str, half: str, capsys: pytest.CaptureFixture
) -> None:
    """Check memory and traffic against the planner's; with all ranks also that none hangs and that
    each element is saved once.
    """
    precision = {"bf16": half == "bf16", "fp16": half == "fp16"}
    batch = 8 if stage == 3 else 16
    figures = rehearse(folder, zero_stage=stage, ranks=ranks, global_batch_size=batch, **precision)
    check_traffic(figures, NORM if half == "fp16" else 0)
    for one in figures["ranks"]:
        assert abs(one["peak"] / one["planned"] - 1) < 0.1, (stage, one)

    out = capsys.readouterr().out
    if ranks != "all":
        assert "is checked with --ranks all" in out
        return

    assert "collectives: all complete, played with ranks 0, 1, 2, 3" in out
    assert "checkpoint: each element of weights and moments is saved once" in out


@pytest.mark.parametrize(
    "layout",
    [
        {"expert_parallel_size": 2, "zero_stage": 2, "prototypes": 2},
        {"expert_parallel_size": 4, "zero_stage": 3, "sequence_parallel": True, "ranks": "0,3"},
    ],
)
def test_a_sound_run_with_experts(
    folder: Path, layout: dict, capsys: pytest.CaptureFixture
) -> None:
    batch = 8 if layout["zero_stage"] == 3 else 16  # gathers between micro-batches are estimates
    figures = rehearse(folder, experts=8, global_batch_size=batch, **layout)
    check_traffic(figures, 4 * NORM)  # at stage 3 each group of experts has a norm of its own
    for one in figures["ranks"]:
        assert abs(one["peak"] / one["planned"] - 1) < 0.1, one

    out = capsys.readouterr().out
    assert "collectives: all complete, played with ranks 0" in out
    saved = "checkpoint: each element of weights and moments is saved once" in out
    assert saved == ("ranks" not in layout)


@pytest.mark.parametrize("preset", ["m6-1.4b", "m6-100b"])
def test_presets_fit_as_planned(folder: Path, preset: str) -> None:
    """Rehearse some presets; tests/campaigns/presets.py does all."""
    one = rehearse_preset(folder, preset)
    assert abs(one["peak"] / one["planned"] - 1) < 0.1, one


def test_memory_with_offload(folder: Path) -> None:
    """Check what is on device and host together: a dry run does not tell them apart."""
    for stage, batch in ((1, 0), (2, 0), (2, 16), (3, 0)):
        file = folder / f"offload{stage}.json"
        places = {"offload_optimizer": {"device": "cpu"}}
        if stage == 3:
            places["offload_param"] = {"device": "cpu"}
        file.write_text(json.dumps({"zero_optimization": {"stage": stage, **places}}))

        changes = {"zero_stage": stage, "deepspeed_config": str(file), "global_batch_size": batch}
        figures = rehearse(folder, ranks="0", **changes)
        check_traffic(figures, NORM)
        [one] = figures["ranks"]
        assert abs(one["peak"] / one["planned"] - 1) < 0.1, (stage, one)


def test_gradients_and_activations_at_once(folder: Path) -> None:
    """Check the peak of stage 2, whose gradients are reserved while all activations are held; they
    are 7 % of it here. The last rank updates the last parameters, whose gradients come first.
    """
    file = folder / "buckets.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000}}))
    changes = {"world_size": 2, "tensor_model_parallel_size": 1, "micro_batch_size": 64}
    [one] = rehearse(folder, deepspeed_config=str(file), zero_stage=2, ranks="1", **changes)[
        "ranks"
    ]
    assert abs(one["peak"] / one["planned"] - 1) < 0.03, one


@pytest.mark.parametrize(("secondary", "prefetch"), [(0, 50_000_000), (2, 50_000_000)])
def test_weights_that_are_gathered_again(folder: Path, secondary: int, prefetch: int) -> None:
    """Check that no more stays gathered than the live limit says, in half precision too, and from
    whom the rest comes a second time.
    """
    limit = 2_000_000
    zero = {
        "stage": 3,
        "stage3_max_live_parameters": limit,
        "stage3_prefetch_bucket_size": prefetch,
        "zero_hpz_partition_size": secondary,
    }
    file = folder / f"secondary{secondary}.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    changes = {"deepspeed_config": str(file), "zero_stage": 3, "tensor_model_parallel_size": 1}
    # with groups one process rehearses several ranks, here two of one group
    ranks = "0,1" if secondary else "0"
    figures = rehearse(folder, ranks=ranks, processes=1, bf16=False, fp16=True, **changes)

    found = {(one["operation"], one["group"]): one for one in figures["collectives"]}
    again = found["all_gather", "secondary" if secondary else "data"]
    spare = 2 * largest_parameter(MEASURABLE, 1) / (secondary or figures["world_size"])
    assert abs(again["planned"] - again["bytes"]) <= spare
    assert found["reduce_scatter", "data"]["bytes"] == found["reduce_scatter", "data"]["planned"]
    if secondary:
        assert found["all_gather", "data"]["bytes"] == found["all_gather", "data"]["planned"]

    for one in figures["ranks"]:
        assert abs(one["peak"] / one["planned"] - 1) < 0.1, one


def test_an_nvme_disk_that_is_not_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rehearse offload of everything to a disk of another machine: nothing is written."""
    nvme = tmp_path / "none"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 1_000_000}
    zero["offload_optimizer"] = {"device": "nvme", "nvme_path": "auto", "buffer_count": 5}
    zero["offload_param"] = {"device": "nvme", "nvme_path": str(nvme), "buffer_size": 2_000_000}
    file = tmp_path / "nvme.json"
    file.write_text(json.dumps({"zero_optimization": zero}))

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    changes = {"deepspeed_config": str(file), "nvme_path": str(nvme), "zero_stage": 3}
    figures = rehearse(folder, ranks="2", **changes)
    check_traffic(figures, NORM)
    for one in figures["ranks"]:
        assert abs(one["peak"] / one["planned"] - 1) < 0.1, one
    assert not nvme.exists()
    assert not list((tmp_path / "temporary").iterdir())


def test_what_fused_kernels_keep(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that Triton's kernels are rehearsed unless others are named, and that a run which does
    not fit its GPU is refused.
    """
    changes = {"ranks": "0", "micro_batch_size": 64}
    plain, fused = (rehearse(folder, kernels=name, **changes) for name in ("torch", "auto"))
    peaks = [figures["ranks"][0]["peak"] for figures in (plain, fused)]
    assert peaks[1] < 0.8 * peaks[0]
    [one] = fused["ranks"]
    assert abs(one["peak"] / one["planned"] - 1) < 0.1, one

    out = capsys.readouterr().out
    assert "rehearsing 1 of 4 ranks: DP2 x TP2, ZeRO-1, bf16, triton kernels; micro-batch" in out

    config = DryRunConfig(gpu_memory=sum(peaks) / 2 / 2**30)
    planned = SimpleNamespace(host=0.0, peak=0.0)
    monkeypatch.setattr(dry_run, "planned_memory", lambda *_: planned)
    too_large, small = ([SimpleNamespace(peak=peak, states=0, rank=3)] for peak in peaks)
    assert dry_run.check_fit(config, small).startswith(f"fits: {peaks[1] / 2**30:.2f} of ")
    with pytest.raises(UsageError, match=r"the run would not fit: .* of the GPU, rank 3; lower"):
        dry_run.check_fit(config, too_large)

    planned.host = peaks[0] - peaks[1]  # then the device has less, but not less than planned
    assert dry_run.check_fit(config, too_large).startswith("fits")
    planned.peak = 2 * peaks[0]
    with pytest.raises(UsageError, match="would not fit"):
        dry_run.check_fit(config, too_large)

    assert DryRunConfig(device="a100-40").memory_of_gpu == 40 * 2**30
    assert DryRunConfig().memory_of_gpu == 0


def check_traffic(figures: dict, slack: int = 0) -> None:
    """Compare what the arithmetic says of each collective with what was called: equal bytes, except
    for `slack`, and for rows to experts, of which virtual ranks send those that pad as well.
    """
    assert len(figures["collectives"]) >= 2
    for one in figures["collectives"]:
        more = 0.05 * one["bytes"] if one["operation"] == "alltoall" else 0
        assert abs(one["planned"] - one["bytes"]) <= slack + more, one


@pytest.mark.parametrize("recompute", [False, True])
def test_traffic_of_split_rows(folder: Path, recompute: bool) -> None:
    split = {"sequence_parallel": True, "recompute_activations": recompute, "ranks": "0"}
    check_traffic(rehearse(folder, **split))
    if recompute:
        check_traffic(rehearse(folder, **split | {"sequence_parallel": False}))
    else:
        check_traffic(rehearse(folder, ranks="0", zero_stage=0, bf16=False))


def test_one_more_collective_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a barrier of its own in one rank: a broadcast that the others do not call."""
    plain = virtual_rank.run_step

    def planted(engine, job, micro_batches, streams) -> bool:
        if engine.state.rank == 3:
            dist.broadcast(torch.zeros(7), group=engine.state.data_group, group_src=0)
        return plain(engine, job, micro_batches, streams)

    monkeypatch.setattr(virtual_rank, "run_step", planted)
    with pytest.raises(UsageError, match=r"would hang: rank \d calls .* in its data group, rank"):
        rehearse(folder, ranks="1,3")


def test_a_rank_without_images_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a batch of texts alone in one data-parallel rank at ZeRO-3, where each rank gathers
    only the layers that it runs.
    """
    plain = dry_run.micro_batches

    def planted(config, job, state) -> list:
        batches = plain(config, job, state)
        if state.data_rank == 1:
            job.task.loss = lambda output, batch, totals: (output.msm_losses.sum(), None)
            batches = [texts_alone(batch) for batch in batches]
        return batches

    monkeypatch.setattr(dry_run, "micro_batches", planted)
    with pytest.raises(UsageError, match="would hang: rank"):
        rehearse(folder, zero_stage=3, ranks="0,2")


def texts_alone(batch):
    """Return the texts of a batch, without images."""
    tokens = torch.arange(len(batch.token_ids))
    none = torch.zeros(0, dtype=torch.int64)
    return dataclasses.replace(
        batch,
        image_offsets=torch.zeros_like(batch.image_offsets),
        joint_offsets=batch.text_offsets,
        joint_order=tokens,
        text_index=tokens,
        **dict.fromkeys(
            ("image_index", "region_rows", "region_counts", "summary_rows", "hidden_regions"), none
        ),
        features=batch.features[:0],
        locations=batch.locations[:0],
        mrm_positions=none,
        mrm_class_ids=batch.mrm_class_ids[:0],
        mrm_class_probs=batch.mrm_class_probs[:0],
        max_image=0,
        max_joint=batch.max_text,
    )


def played(*ranks: list[tuple[str, str]]) -> str:
    """Play (operation, group) lists of ranks in one layout of TP2 against each other."""
    return find_hang(
        [
            Rehearsal(
                number,
                number % 2,
                number // 2,
                MEASURABLE,
                {},
                None,
                secondary_group=number // 2,
                collectives=[Collective(*one, 1, "float32") for one in calls],
            )
            for number, calls in enumerate(ranks)
        ]
    )


def test_what_hangs_and_what_does_not() -> None:
    data = ("allreduce", "data")
    tensor = ("allreduce", "tensor")
    world = ("broadcast", "world")
    assert not played([tensor, data], [tensor, data], [tensor, data], [tensor, data])
    # the tensor-parallel groups of other data may do more among themselves
    assert not played([tensor, data], [tensor, data], [data], [data])
    assert not played([data, tensor], [tensor, data], [data, tensor], [tensor, data])
    node = ("allgather", "secondary")
    assert not played([node, data], [node, data], [data], [data])
    assert "waits in allgather" in played([node, data], [data], [data], [data])
    # each of the four waits for the next
    assert "rank 0 waits" in played([data, tensor], [tensor, data], [tensor, data], [data, tensor])
    assert "has ended its step" in played([data, data], [data], [data], [data])
    assert "rank 0 calls allreduce" in played([data], [data], [("allgather", "data")], [data])
    assert "waits in broadcast" in played([world], [world], [world], [data])


def test_what_is_saved_twice_or_not_at_all() -> None:
    outlines, shapes = outlines_of(16, 4, 2)
    assert not missing_or_double(outlines, shapes)

    some = {place: runs for place, runs in outlines.items() if place != (2, 3)}
    assert "of tensor rank 2" in missing_or_double(some, shapes)
    assert "by no rank" in missing_or_double(some, shapes)
    outlines[1, 0] = [*outlines[1, 0], outlines[1, 1][0]]
    assert "is saved twice" in missing_or_double(outlines, shapes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 6, "tensor_model_parallel_size": 4}, "--world-size 6 is not a multiple"),
        ({"ranks": "0,4"}, "--ranks 0,4: expected all, or numbers from 0 to 3"),
        ({"tensor_model_parallel_size": 1, "ranks": "x"}, "--ranks x: expected all"),
        ({"micro_batch_size": AUTO}, "--micro-batch-size auto is found by trial"),
        ({"experts": 8, "balance_coefficient": 0.1}, r"would cut routing groups: .* multiple of"),
        ({"kernels": "triton"}, "--kernels triton: TRITON_INTERPRET is set; use --kernels torch"),
    ],
)
def test_bad_input(
    folder: Path, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match=message):
        rehearse(folder, **changes)


def test_routing_groups_of_more_ranks_than_partitions(folder: Path) -> None:
    limited = {"capacity_factor": 1.0, "balance_coefficient": 0.1, "routing_group": 2}
    shared = {"words": (6, 8), "experts": 8, "micro_batch_size": 2, "world_size": 128}
    figures = rehearse(folder, ranks="0", global_batch_size=0, **shared, **limited)
    assert figures["ranks"]


def test_one_process_is_many_ranks() -> None:
    """Check that groups of a virtual rank are those of the layout."""
    with one_of(512, 77):
        state = ParallelState(8)
        assert (state.tensor_rank, state.data_rank) == (5, 9)
        assert dist.get_process_group_ranks(state.data_group) == list(range(5, 512, 8))
