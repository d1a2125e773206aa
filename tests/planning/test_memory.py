"""Test the memory prediction against the counts of torch's allocator: within 10 % for every stage,
precision and layout.
"""

import dataclasses
import gc
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.packing import pack
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.machines.processes import start_processes
from megatron_interbert.model.construction import give_memory, on_meta
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.shared_weights import SharedWeights, unit_of
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.planning.activations import activations
from megatron_interbert.planning.layout import Layout, Load, rank_parameters, rank_shapes
from megatron_interbert.planning.memory import largest_micro_batch, predict
from megatron_interbert.tasks.precision import Precision
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.training.engine import Engine
from megatron_interbert.virtual.samples import random_examples
from tests.dist import run_on_ranks
from tests.launching import ROOT
from tests.sizes import MEASURABLE as SIZES

SAMPLES = 24
CPU = torch.device("cpu")


def live_bytes(prof, names):
    """Return {phase: (bytes live at its end, bytes at its peak)} of all tensors allocated since the
    profile began.
    """
    events = prof.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    phases = sorted((e.end_ns(), e.name()) for e in events if e.name() in names)
    live = 0
    number = 0
    found = {}

    for end, name in phases:
        peak = live
        while number < len(changes) and changes[number][0] <= end:
            live += changes[number][1]
            number += 1
            peak = max(peak, live)

        found[name] = live, peak

    return found


def measure(layout, state, sizes=SIZES, samples=SAMPLES, steps=2):
    """Return (bytes kept by a forward pass, peak bytes of a step, load) of this rank, measured in
    the last step, when Adam's moments exist.
    """
    examples = random_examples(sizes, samples, (8, 20), (10, 36), seed=state.data_rank)
    batch = pack(examples, sizes.feature_dim)
    task = PretrainingTask()
    names = ("batch", "forward", "backward", "update")

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        config = RunConfig(
            micro_batch_size=samples,
            bf16=layout.half,
            zero_stage=layout.zero_stage,
            tensor_model_parallel_size=layout.tensor,
            global_batch_size=samples * layout.data * (2 if layout.accumulates else 1),
        )

        kernels = choose_kernels(
            "triton" if layout.fused else "auto",
            torch.device("cpu"),
            attention_dropout=True,
            dtype=torch.bfloat16 if layout.half else torch.float32,
        )
        streams = RandomStreams(0, state.data_rank, state.tensor_rank)
        model = InterBert(
            sizes, state=state, kernels=kernels, streams=streams, recompute=layout.recompute
        )
        initialise(model, sizes, 0, state)
        engine = Engine(model, config, state)

        for _ in range(steps):
            with record_function("batch"):
                batch = pack(examples, sizes.feature_dim)
                if layout.accumulates:
                    earlier = task.loss(engine.forward(batch), batch, batch.target_counts())[0]
                    engine.backward(earlier, last=False)
                    del earlier
            with record_function("forward"):
                loss = task.loss(engine.forward(batch), batch, batch.target_counts())[0]
            with record_function("backward"):
                engine.backward(loss, last=True)
            with record_function("update"):
                engine.step(1e-4)

    found = live_bytes(prof, names)  # of the last step: it overwrites earlier ones
    load = Load(
        samples,
        len(batch.token_ids) / samples,
        len(batch.features) / samples,
        batch.max_text,
        batch.max_image - 1,
    )

    return found["forward"][0] - found["batch"][0], max(peak for _, peak in found.values()), load


def check(layouts):
    start_processes()
    for layout in layouts:
        state = ParallelState(layout.tensor, layout.sequence_parallel)
        assert rank_parameters(SIZES, layout.tensor) == sum(
            p.numel() for p in InterBert(SIZES, state=state).parameters()
        )
        kept, peak, load = measure(layout, state)
        ours = predict(SIZES, layout, load)

        # at stage 3, gathered weights would be counted as well
        if layout.zero_stage < 3 or layout.data == 1:
            assert abs(activations(SIZES, layout, load)[0] / kept - 1) < 0.05, (
                layout,
                activations(SIZES, layout, load)[0],
                kept,
            )

        assert abs(ours.peak / peak - 1) < 0.1, (layout, ours, peak)
        gc.collect()  # otherwise freed late, in the next layout's measurement


def test_one_rank_against_the_allocator():
    plain = [Layout(zero_stage=stage) for stage in range(4)]
    run_on_ranks(
        1,
        check,
        [*plain, Layout(half=True), Layout(zero_stage=3, half=True), Layout(recompute=True)],
    )


def test_two_data_parallel_ranks():
    on_one_of_two_ranks("check_data_parallel")


def check_data_parallel():
    layouts = [Layout(data=2, zero_stage=stage) for stage in range(4)]
    layouts += [Layout(data=2, zero_stage=stage, accumulates=True) for stage in (0, 1, 2)]
    check([*layouts, *(Layout(data=2, zero_stage=stage, half=True) for stage in (1, 3))])

    # ZeRO has imported Muon, but not the compiler with it
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules
    assert "torch._inductor.compile_fx" not in sys.modules
    assert "TORCHDYNAMO_DISABLE" not in os.environ


def test_two_tensor_parallel_ranks():
    on_one_of_two_ranks("check_tensor_parallel")


def check_tensor_parallel():
    layouts = [Layout(tensor=2, zero_stage=stage) for stage in range(4)]
    layouts += [Layout(tensor=2, zero_stage=stage, half=True) for stage in (1, 3)]
    check(
        [
            *layouts,
            *(
                Layout(tensor=2, sequence_parallel=True, recompute=recompute)
                for recompute in (False, True)
            ),
        ]
    )


def on_one_of_two_ranks(name):
    """Run a function of this module in a process that is one of two ranks of a fake process group.

    With gloo results would vary: its threads free tensors late and unseen by the profiler.
    """
    code = (
        "import torch.distributed as dist; from torch.testing._internal.distributed.fake_pg import"
        ' FakeStore;dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore());from'
        f" tests.planning import test_memory as m; m.{name}()"
    )

    in_a_process(
        code,
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
    )


def in_a_process(code, **variables):
    environment = {**os.environ, **variables}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_what_the_fused_kernels_keep():
    """Measure in Triton's interpreter, whose own copies torch does not count."""
    pytest.importorskip(
        "triton", reason="triton is not installed (pip install -r requirements.txt)"
    )
    in_a_process(
        "from tests.planning import test_memory as m; m.check_fused()", TRITON_INTERPRET="1"
    )


def check_fused():
    start_processes()
    layout = Layout(zero_stage=0, fused=True)
    # the interpreter is slow
    one = dict.fromkeys(("interaction_layers", "text_layers", "image_layers"), 1)
    sizes = dataclasses.replace(SIZES, **one, vocab_size=200)
    kept, _, load = measure(layout, ParallelState(), sizes, samples=2, steps=1)
    ours = activations(sizes, layout, load)[0]
    assert abs(ours / kept - 1) < 0.05, (ours, kept)


def test_the_largest_micro_batch_just_fits():
    layout = Layout(half=True, fused=True)
    load = Load(1)
    room = 8 * 2**30
    samples = largest_micro_batch(SIZES, layout, load, room)
    assert predict(SIZES, layout, dataclasses.replace(load, samples=samples)).peak <= room
    assert predict(SIZES, layout, dataclasses.replace(load, samples=samples + 1)).peak > room
    assert largest_micro_batch(SIZES, layout, load, 1000.0) == 0


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_the_copy_that_evaluations_need(stage: int, precision: str) -> None:
    """Count the bytes of the copies themselves, as one of four ranks."""
    state = ParallelState()
    state.data_size = 4
    precision = Precision(precision)
    model = precision.convert(on_meta(lambda: InterBert(SIZES, state=state)))
    if stage < 3:
        parts = list(give_memory(model, CPU).parameters())
    else:
        parts = list(SharedWeights(model, state, CPU, 1, CPU).parts.values())

    layout = Layout(data=4, zero_stage=stage, half=True, copied=precision.bytes)
    copy = sum(part.nbytes for part in parts)
    found = predict(SIZES, layout, Load(1))
    assert abs(found.copy / copy - 1) < 0.02

    without = predict(SIZES, dataclasses.replace(layout, copied=0), Load(1))
    assert without.copy == 0
    if stage < 3:
        assert found.peak - without.peak == found.copy


@pytest.mark.parametrize("limit", ["one layer", "some", "everything"])
def test_what_evaluations_gather(limit: str) -> None:
    """Make an evaluation the peak, with a copy in fp32 beside training in bf16, and compare with
    the elements of real units.
    """
    units: dict[str, int] = {}
    for name, shape in rank_shapes(SIZES, 1).items():
        units[unit_of(name)] = units.get(unit_of(name), 0) + math.prod(shape)

    largest = max(units.values())
    live = {"one layer": 1, "some": largest + 1000, "everything": 10**9}[limit]
    stays = {"one layer": largest, "some": largest + 1000, "everything": sum(units.values())}[limit]
    layout = Layout(data=64, zero_stage=3, half=True, copied=4, live=live, bucket=1000, prefetch=0)
    found = predict(SIZES, layout, Load(1))
    kept = found.weights + found.optimizer + found.gradients + found.buffers + found.copy
    assert found.peak == pytest.approx(kept + 4 * (stays + largest))

    on_host = dataclasses.replace(layout, parameters_on="cpu", optimizer_on="cpu")
    offloaded = predict(SIZES, on_host, Load(1))
    without = predict(SIZES, dataclasses.replace(on_host, copied=0), Load(1))
    assert offloaded.host - without.host == pytest.approx(found.copy)
    assert offloaded.peak == pytest.approx(
        offloaded.gradients + offloaded.buffers + 4 * (stays + largest)
    )


def test_one_rank_has_no_parts() -> None:
    """Check that one data-parallel rank at stage 3 holds the copy once, unless it offloads."""
    alone = Layout(zero_stage=3, half=True, copied=4, optimizer_on="cpu")
    found = predict(SIZES, alone, Load(1))
    without = predict(SIZES, dataclasses.replace(alone, copied=0), Load(1))
    assert found.peak - without.peak == found.copy == 4 * rank_parameters(SIZES, 1)
    assert dataclasses.replace(alone, parameters_on="cpu").shares_copy
