"""Test that first weights, and those of --init-from, are the same on every layout, element by
element, and that they are drawn from the distribution they claim.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.model.initialise import BLOCK, draw_normal, initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import SliceRun, in_slices, shard
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.first_weights import open_initial_weights
from megatron_interbert.training.model_plan import ModelPlan, build_model
from megatron_interbert.weights.output import Output
from megatron_interbert.weights.sources import open_weights
from megatron_interbert.weights.targets import write_target
from tests.dist import run_on_ranks
from tests.sizes import FOR_EIGHT_RANKS as SIZES
from tests.tools.test_convert import random_source

SEED = 5
TENSOR = (1, 2, 4)
STAGES = ((0, False), (1, True), (2, True), (3, True), (3, False))  # and whether in bfloat16


def whole_model(seed: int) -> dict[str, torch.Tensor]:
    """Draw the parameters of a model on one process: those that all layouts must hold."""
    model = InterBert(SIZES)
    initialise(model, SIZES, seed, ParallelState(alone=True))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def fill_layouts(folder: str) -> None:
    """Fill models of all layouts with first weights, and with those of checkpoints."""
    from megatron_interbert.machines.processes import start_processes
    from megatron_interbert.parallel.rng import RandomStreams
    from megatron_interbert.training.engine import Engine
    from megatron_interbert.training.fragments import FragmentedState

    start_processes()
    drawn = whole_model(SEED)
    given = torch.load(f"{folder}/given.pt")

    for tensor, (stage, half) in itertools.product(TENSOR, STAGES):
        state = ParallelState(tensor)
        config = RunConfig(
            zero_stage=stage,
            bf16=half,
            tensor_model_parallel_size=tensor,
            micro_batch_size=1,
            seed=SEED,
        )
        job = Job(None, None, SIZES, ("msm", "mrm", "itm"), {}, "")
        plan = ModelPlan(job, state, Kernels(), SEED, recompute=False)
        model = build_model(plan, config, RandomStreams(0), torch.device("cpu"))
        engine = Engine(model, config, state)
        dtype = torch.bfloat16 if half else torch.float32
        for parameter in engine.model.parameters():
            assert getattr(parameter, "ds_tensor", parameter).dtype == dtype, (tensor, stage, half)

        held = FragmentedState(engine)

        held.fill_weights(plan.first_weights)
        check(engine, held, drawn, (tensor, stage))
        for source in ("tp1", "tp4", "huggingface"):
            weights = open_initial_weights(
                plan.without_memory(), plan.first_weights, f"{folder}/{source}", state
            )
            held.fill_weights(weights)
            check(engine, held, given, (tensor, stage, source))


def check(engine, held, whole, where) -> None:
    """Compare this rank's fp32 weights, and those it computes with, with slices of whole ones; over
    all ranks each element must be held.
    """
    state = engine.state
    seen = 0

    for fragment in held.owned():
        name = fragment.name
        mine = shard(whole[name], name, state.tensor_rank, state.tensor_size).reshape(-1)
        part = mine[fragment.start : fragment.start + fragment.length]
        assert torch.equal(fragment.tensors["weight"], part), (where, name)
        seen += fragment.length

    if engine.update.stage < 3:
        for name, parameter in engine.model.named_parameters():
            mine = shard(whole[name], name, state.tensor_rank, state.tensor_size)
            assert torch.equal(parameter, mine.to(parameter.dtype)), (where, name)

    of_group = int(state.sum_over_data(torch.tensor(seen)))
    slices = [shard(tensor, name, 0, state.tensor_size) for name, tensor in whole.items()]
    assert of_group == sum(part.numel() for part in slices), where


def test_every_layout_holds_the_same_weights(tmp_path: Path) -> None:
    torch.save(random_source(SIZES, tmp_path / "tp1"), tmp_path / "given.pt")
    source = open_weights(tmp_path / "tp1")
    write_target("sharded", Output(source, tensor_parallel=4), tmp_path / "tp4")
    write_target("huggingface", Output(source), tmp_path / "huggingface")
    run_on_ranks(4, fill_layouts, str(tmp_path))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_runs_of_slices(ranks: int) -> None:
    """Check that a run of a slice, and where elements of the whole are in the slices, agree with
    plain indexing of a whole tensor, for each way of cutting.
    """
    random = np.random.default_rng(ranks)
    shapes = {
        "interaction.layers.0.mlp.up.weight": (8, 5),  # cut by rows
        "interaction.layers.0.mlp.down.weight": (6, 8),  # cut by columns
        "interaction.layers.0.mlp.up.bias": (12,),
        "itm_head.weight": (3, 7),  # not cut
    }

    for name, shape in shapes.items():
        whole = torch.arange(np.prod(shape)).view(shape)
        slices = [shard(whole, name, rank, ranks).reshape(-1) for rank in range(ranks)]
        for _ in range(60):
            rank = int(random.integers(ranks))
            start, end = sorted(random.integers(0, len(slices[rank]) + 1, size=2))
            part = tuple(shard(whole, name, rank, ranks).shape)
            run = SliceRun(name, part, rank, ranks, int(start), int(end - start))
            expected = slices[rank][start:end]
            flat = whole.reshape(-1)
            assert torch.equal(run.of(flat), expected)
            assert torch.equal(
                run.gather(lambda first, length, flat=flat: flat[first : first + length]), expected
            )
            pieces = [piece.of(flat) for piece in run.split(3)]
            assert torch.equal(torch.cat([*pieces, expected[:0]]), expected)

            first, last = sorted(random.integers(0, len(flat) + 1, size=2))
            found = in_slices(name, shape, ranks, int(first), int(last - first))
            joined = [slices[rank][begin : begin + length] for rank, begin, length in found]
            assert torch.equal(torch.cat([*joined, flat[:0]]), flat[first:last])


def test_runs_are_drawn_without_the_rest() -> None:
    """Check that any run equals the same part of a longer one, across the borders of blocks."""
    whole = draw_normal(1, "weight", 0, 3 * BLOCK)
    for start, length in ((0, 1), (BLOCK - 1, 2), (BLOCK + 7, BLOCK), (3 * BLOCK - 5, 5)):
        assert np.array_equal(
            draw_normal(1, "weight", start, length), whole[start : start + length]
        )


def test_the_distribution() -> None:
    """Check mean, deviation and the distance from the normal distribution (Kolmogorov-Smirnov), and
    that elements, blocks, names and seeds do not go together.
    """
    count = 1 << 20
    drawn = torch.from_numpy(draw_normal(0, "a", 0, count)).double()
    assert abs(drawn.mean()) < 5 / count**0.5
    assert abs(drawn.std() - 1) < 5 / (2 * count) ** 0.5

    expected = torch.special.ndtr(drawn.sort().values)
    steps = torch.arange(1, count + 1) / count
    assert (expected - steps).abs().max() < 1.95 / count**0.5  # one in a thousand exceeds it

    others = {
        "next element": drawn.roll(1),
        "next block": drawn.roll(BLOCK),
        "other name": torch.from_numpy(draw_normal(0, "b", 0, count)).double(),
        "other seed": torch.from_numpy(draw_normal(1, "a", 0, count)).double(),
    }
    for what, other in others.items():
        assert abs((drawn * other).mean()) < 5 / count**0.5, what


def test_what_is_not_drawn() -> None:
    """Check biases, gains and the vocabulary's padded rows, and the deviation of matrices."""
    for name, tensor in whole_model(SEED).items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif tensor.dim() == 1:
            assert (tensor == 1).all(), name
        else:
            words = tensor[: SIZES.vocab_size] if name == "text_embedding.word.weight" else tensor
            if words.numel() > 1000:
                assert abs(words.std() / SIZES.initializer_range - 1) < 0.1, name
            assert not tensor[len(words) :].any(), name
