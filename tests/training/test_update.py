"""Test the three kinds of update: they agree, a non-finite gradient changes nothing, and they take
few operations.
"""

import collections
import contextlib
import dataclasses
import math
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.packing import pack
from megatron_interbert.kernels import choice
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.machines.processes import start_processes
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.training import engine as engine_module
from megatron_interbert.training.engine import Engine
from megatron_interbert.training.fragments import FragmentedState
from megatron_interbert.training.master_weights import MasterWeights
from megatron_interbert.training.update import DeepSpeedUpdate, PartitionedUpdate, WholeUpdate
from megatron_interbert.virtual.samples import random_examples
from tests.corpus import write_store
from tests.dist import run_on_ranks
from tests.launching import train

SAMPLES = 4
# the square of the last is infinite in float32, but not in DeepSpeed's float64
BAD = (math.nan, math.inf, -math.inf, 1e30)
DATA = {"vocab_size": 300, "feature_dim": 64, "num_classes": 20}
TINY = dataclasses.replace(PRESETS["tiny"], **DATA)
NARROW_BASE = dataclasses.replace(
    PRESETS["base"], hidden_size=48, ffn_hidden_size=96, pooled_size=48, **DATA
)


class Run:
    """Run steps of an engine on random samples, which are the same for every run."""

    def __init__(self, state, sizes=TINY, **settings):
        self.state = state
        self.sizes = sizes
        self.task = PretrainingTask()
        self.config = RunConfig(
            micro_batch_size=SAMPLES, tensor_model_parallel_size=state.tensor_size, **settings
        )
        dtype = torch.bfloat16 if self.config.bf16 else torch.float32
        kernels = choose_kernels("auto", torch.device("cpu"), attention_dropout=True, dtype=dtype)
        self.streams = RandomStreams(0, state.data_rank, state.tensor_rank)
        model = InterBert(sizes, state=state, kernels=kernels, streams=self.streams)
        initialise(model, sizes, 0, state)
        # as DeepSpeed begins: its fp32 weights are copies of the bf16 ones
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()

        self.engine = Engine(model, self.config, state)

    def forward(self, number):
        """Return the loss of a step."""
        self.streams.start_step(number)
        batch = pack(
            random_examples(
                self.sizes, SAMPLES, (8, 20), (10, 36), seed=100 * number + self.state.data_rank
            ),
            64,
        )
        totals = self.state.sum_over_data(batch.target_counts())

        return self.task.loss(self.engine.forward(batch), batch, totals)[0]

    def step(self, number):
        """Run a step; return (gradient norm, whether weights were updated)."""
        self.engine.backward(self.forward(number), last=True)
        return self.engine.step(1e-3)

    def held(self):
        """Copy this rank's fp32 weights and moments, and the parameters that the model computes
        with (not at ZeRO-3, which gathers them as needed).
        """
        fragments = FragmentedState(self.engine).held()
        held = {
            (f.name, f.start, kind): tensor.clone()
            for f in fragments
            for kind, tensor in f.tensors.items()
        }

        if self.engine.update.stage < 3:
            held |= {
                (name, 0, "model"): p.detach().clone()
                for name, p in self.engine.model.named_parameters()
            }

        return held


def same(left, right):
    """Check whether two states are equal, bit for bit."""
    assert left.keys() == right.keys()
    return all(torch.equal(left[key], right[key]) for key in left)


KINDS = [
    # precision, ranks, tensor-parallel ranks, stage, expected kind
    *(("bf16", 1, 1, stage, WholeUpdate) for stage in (1, 2, 3)),
    *(("fp32", 1, 1, stage, WholeUpdate) for stage in (0, 1, 2, 3)),
    *(("bf16", 2, 2, stage, WholeUpdate) for stage in (1, 3)),
    ("fp32", 2, 2, 1, WholeUpdate),
    ("fp32", 2, 1, 0, WholeUpdate),
    *(
        (precision, 2, 1, stage, PartitionedUpdate)
        for precision in ("bf16", "fp32")
        for stage in (1, 2)
    ),
    *((precision, 2, 1, 3, DeepSpeedUpdate) for precision in ("bf16", "fp32")),
]


def check_bad_gradients(ranks):
    """Check that a bad value in one gradient of the last rank changes nothing on any rank, and that
    the run continues as if it had not happened.
    """
    start_processes()

    for precision, of_ranks, tensor, stage, kind in KINDS:
        if of_ranks != ranks:
            continue

        case = f"{precision} DP{ranks // tensor} TP{tensor} ZeRO-{stage}"
        settings = {"bf16": precision == "bf16", "zero_stage": stage, "clip_grad": 1.0}
        run, undisturbed = (Run(ParallelState(tensor), **settings) for _ in range(2))
        assert type(run.engine.update) is kind, case
        assert run.step(1) == undisturbed.step(1), case
        assert same(run.held(), undisturbed.held()), case

        for number, bad in enumerate(BAD if kind is not DeepSpeedUpdate else BAD[:3]):
            before = run.held()
            with spoiled(run, number, bad):
                norm, applied = run.step(2)
            assert not applied, (case, bad)
            assert not math.isfinite(norm), (case, bad)
            assert same(before, run.held()), (case, bad)

        assert run.step(3) == undisturbed.step(3), case
        assert same(run.held(), undisturbed.held()), case
        assert not same(before, run.held()), case


@contextlib.contextmanager
def spoiled(run, number, bad):
    """Set one element of a parameter's gradient to `bad` on the last rank, inside the context."""
    names = (
        "image_stream.layers.0.mlp.up.weight",
        "text_pooler.dense.bias",
        "itm_head.bias",
        "text_embedding.word.weight",
    )
    parameter = dict(run.engine.model.named_parameters())[names[number]]

    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[-1] = bad
        return gradient

    last = run.state.rank == run.state.world_size - 1
    hook = parameter.register_hook(spoil) if last else None

    try:
        yield
    finally:
        if hook:
            hook.remove()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(ranks):
    run_on_ranks(ranks, check_bad_gradients, ranks)


def check_against_deepspeed():
    """Compare our steps with DeepSpeed's own: equal to the bit without clipping, within an fp32
    rounding with it.
    """
    start_processes()

    for precision, clip, steps in (
        ("bf16", 0.0, 6),
        ("fp32", 0.0, 6),
        ("bf16", 0.5, 1),
        ("fp32", 0.5, 1),
    ):
        case = (precision, clip)
        runs = {}

        for kind in (DeepSpeedUpdate, PartitionedUpdate, WholeUpdate):
            with chosen(kind):
                runs[kind] = Run(
                    ParallelState(), bf16=precision == "bf16", zero_stage=1, clip_grad=clip
                )

        for number in range(1, steps + 1):
            losses = {kind: float(run.forward(number).detach()) for kind, run in runs.items()}
            norms = [run.step(number)[0] for run in runs.values()]
            assert len(set(losses.values())) == 1, (case, number, losses)
            assert norms[1:] == pytest.approx([norms[0]] * 2, rel=2e-6), (case, number)

        expected = runs.pop(DeepSpeedUpdate).held()
        for kind, run in runs.items():
            held = run.held()
            assert clip or same(held, expected), (case, kind)

            for key, theirs in expected.items():
                tolerance = 2**-8 if key[2] == "model" else 1e-6  # bf16 may round to the other side
                assert torch.allclose(held[key], theirs, rtol=tolerance, atol=1e-9), (
                    case,
                    kind,
                    key,
                )


@contextlib.contextmanager
def chosen(kind):
    """Have engines use this kind of update, inside the context."""

    def choose(model, groups, config, state, deepspeed_config):
        return (
            kind(groups, config, state, model)
            if kind is WholeUpdate
            else kind(groups, config, state)
        )

    choice = engine_module.choose_update
    engine_module.choose_update = choose

    try:
        yield
    finally:
        engine_module.choose_update = choice


def test_ours_is_deepspeeds_step():
    run_on_ranks(1, check_against_deepspeed)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_of_bad_steps_ends(processes, tmp_path):
    """Check a learning rate that blows up the weights: every gradient after the first step is NaN,
    and the third of them ends the run.
    """
    store = write_store(tmp_path / "store")
    flags = (
        "--model",
        "tiny",
        "--data-path",
        store,
        "--language",
        "en",
        "--train-iters",
        20,
        "--micro-batch-size",
        2,
        "--lr",
        "1e37",
        "--lr-warmup-fraction",
        0,
        "--bf16",
        "--data-partitions",
        4,
        "--num-workers",
        0,
        "--max-bad-steps",
        3,
    )
    code, out, err = train(processes, *flags)
    assert code != 0
    assert "step 4: the gradient was not finite for 3 steps in a row and the run stops" in out + err
    assert [line for line in out.splitlines() if "step skipped" in line] == [
        f"step {step}: gradient is not finite, step skipped on all ranks" for step in (2, 3)
    ]


class Counting(TorchDispatchMode):
    """Count the operations that torch dispatches, except views."""

    def __init__(self):
        super().__init__()
        self.operations = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not getattr(function, "is_view", False):
            self.operations[str(function)] += 1
        return function(*args, **(kwargs or {}))


def check_operations(layouts):
    """Check how many operations each part of the third step takes, in a model with as many
    parameter tensors as `base`.
    """
    start_processes()

    for tensor, settings, most in layouts:
        # elsewhere, products in bfloat16 take more operations, and less time
        with mock.patch.object(choice, "has_bfloat16_products", return_value=True):
            run = Run(ParallelState(tensor), NARROW_BASE, **settings)
        assert len(list(run.engine.model.parameters())) == 244
        run.step(1)
        run.step(2)

        with Counting() as forward:
            loss = run.forward(3)
        with Counting() as backward:
            run.engine.backward(loss, last=True)
        with Counting() as update:
            run.engine.step(1e-3)

        counts = [sum(part.operations.values()) for part in (forward, backward, update)]
        if run.state.is_main:
            print(settings, counts, flush=True)

        assert all(count <= limit for count, limit in zip(counts, most, strict=True)), (
            settings,
            counts,
        )


def test_an_update_takes_few_operations():
    """Check that hundreds of parameters take tens of operations: each costs host time, even on a
    GPU.

    Without ZeRO's copies, a backward pass takes no more operations in bf16 than in fp32.
    """
    ours = (950, 750, 40)
    run_on_ranks(1, check_operations, [(1, {"bf16": True}, ours), (1, {"zero_stage": 0}, ours)])


def test_fewer_operations_around_deepspeeds_update():
    partitioned = (950, 1300, 50)
    run_on_ranks(2, check_operations, [(1, {"bf16": True, "zero_stage": 1}, partitioned)])


def test_gradients_of_micro_batches_are_added_up_in_fp32():
    """Check the sum of 100 gradients, of which bf16 would lose a half; a parameter without a
    gradient counts as zeros.
    """
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 5), "unused": torch.nn.Linear(2, 2)})
    model["used"].bias.tensor_model_parallel = True
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    masters = MasterWeights(model, torch.bfloat16)
    names = {id(p): name for name, p in model.named_parameters()}
    twins = {names[id(follower)]: twin for twin, follower in masters.pairs()}

    for step in range(2):
        sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in weights.items()}
        for _ in range(100):
            for name, parameter in model["used"].named_parameters(prefix="used"):
                parameter.grad = (1 + torch.rand(parameter.shape) * (step + 1)).bfloat16()
                sums[name] += parameter.grad

            masters.take_gradients()
            assert all(p.grad is None for p in model.parameters())

        for name, expected in sums.items():
            torch.testing.assert_close(twins[name].grad.double(), expected, rtol=1e-5, atol=0.0)

        replicated, sharded = (
            torch.cat(part).double().square().sum() for part in masters.gradients()[:2]
        )
        assert float(sharded) == pytest.approx(float(sums["used.bias"].square().sum()), rel=1e-5)
        assert float(replicated) == pytest.approx(
            float(sums["used.weight"].square().sum()), rel=1e-5
        )
        masters.drop_gradients()
        assert all(twin.grad is None for twin in twins.values())

    for name, parameter in model.named_parameters():
        assert torch.equal(twins[name], weights[name])
        assert torch.equal(parameter, weights[name].bfloat16())
        twins[name].data += 1

    masters.refresh_model()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, (weights[name] + 1).bfloat16())
