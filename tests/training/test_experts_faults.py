"""Test that experts on several ranks neither hang nor lose anything: a rank without images, a task
whose evaluation takes ranks unequal work, a rank that is killed, and layouts that cannot be.
"""

import json
import os
import signal

import numpy as np
import pytest

from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from tests.corpus import write_store
from tests.dist import run_on_ranks
from tests.launching import TINY, ends, evaluate, ran, start_ranks, steps, train, until
from tests.training.test_finetune import flags
from tests.training.test_layouts import parts, run_config

EXPERTS = ("--experts", 8, "--prototypes", 2, "--expert-parallel-size", 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = write_store(tmp_path_factory.mktemp("store") / "s", images=23)
    np.save(path / "hard_images.npy", (np.arange(23)[:, None] + np.arange(1, 4)) % 23)
    return path


def train_without_images(store):
    """Train steps in which one rank has a batch of text alone."""
    from megatron_interbert.data.packing import pack
    from megatron_interbert.machines.processes import start_processes
    from megatron_interbert.training.engine import Engine
    from megatron_interbert.virtual.samples import random_examples

    start_processes()
    limited = {"capacity_factor": 1.0, "balance_coefficient": 0.1, "routing_group": 3}
    for stage, recompute, changes in (
        (0, False, {}),
        (1, True, {}),
        (2, False, {"data_partitions": 2, **limited}),
        (3, False, {}),
    ):
        state = ParallelState(expert_parallel_size=2)
        config = run_config(
            store,
            zero_stage=stage,
            experts=8,
            expert_parallel_size=2,
            recompute_activations=recompute,
            **changes,
        )
        streams = RandomStreams(config.seed, state.data_rank)
        model, _, task = parts(config, state, streams)
        sizes = model.config
        engine = Engine(model, config, state)
        examples = random_examples(sizes, 3, (5, 12), (3, 9), seed=state.rank)
        if state.rank == 1:
            for example in examples:
                example.features = example.locations = example.hidden_regions = None

        batch = pack(examples, sizes.feature_dim)
        for _ in range(2):
            output = engine.forward(batch)
            assert output.router_figures.shape[0] == 4, "each layer with experts was called"
            totals = state.sum_over_data(batch.target_counts())
            engine.backward(task.loss(output, batch, totals)[0], last=True)
            norm, applied = engine.step(1e-3)
            assert applied
            assert norm == pytest.approx(state.gather(norm)[0], rel=1e-6)


def test_a_rank_without_images(store):
    run_on_ranks(2, train_without_images, str(store))


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_of_unequal_work(store, tmp_path, stage):
    """Finetune on two ranks, which evaluate 23 images, and evaluate the result on one process."""
    run = tmp_path / "run"
    more = ("--train-iters", 2, "--zero-stage", stage, *EXPERTS)
    code, out, err = train(2, *flags(store, run, *more), module="megatron_interbert.finetune")
    assert code == 0, out + err

    evaluation = ("retrieval", "--load", run, "--data-path", store, "--output", tmp_path / "e")
    ran(*evaluate(*evaluation))
    alone = json.loads((tmp_path / "e" / "result.json").read_text())["metrics"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    together = next(line for line in lines if line["split"] == "valid")
    for name, value in alone.items():
        assert together[name] == pytest.approx(value), name


def test_a_rank_is_killed_in_a_run(store, tmp_path):
    """Kill one of two ranks; the other must end by itself with one line, and the run resume."""
    save = tmp_path / "run"
    shared = ("--data-path", store, "--save", save, *TINY, *EXPERTS, "--save-interval", 2)
    shared = (*shared, "--data-partitions", 4, "--hang-timeout", 30)
    ranks = start_ranks(*[(*shared, "--train-iters", 100_000)] * 2)
    until(lambda: steps(save) > 5, "some steps")
    os.kill(ranks[1].pid, signal.SIGKILL)
    (code, _, err), _ = ends(ranks)
    assert code != 0
    assert "Traceback" not in err, err
    assert "has gone" in err or "lost the connection" in err, err
    assert len(err.strip().splitlines()) <= 2, err  # of the watchdog, and of the exchange itself

    done = steps(save)
    code, out, err = train(2, *shared, "--train-iters", done + 3)
    assert code == 0, out + err
    assert "resumed from" in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--expert-parallel-size", 2), "the model has no experts"),
        (("--experts", 3, "--expert-parallel-size", 2), "does not divide the 3 experts"),
        (
            ("--experts", 4, "--expert-parallel-size", 4),
            "does not divide the number of proc",
        ),
        (("--experts", 4, "--prototypes", 3), "not a multiple of prototypes"),
        (("--capacity-factor", 1.25), "the model has no experts"),
        (
            ("--experts", 4, "--balance-coefficient", 0.01),
            "--micro-batch-size 4 would cut routing groups: expected a multiple of 256",
        ),
    ],
)
def test_what_cannot_be_is_one_line(store, more, said):
    shared = ("--data-path", store, *TINY, "--train-iters", 1)
    code, out, err = train(2, *shared, *more)
    assert code == 2, out + err
    assert "Traceback" not in err
    assert said in err, err
