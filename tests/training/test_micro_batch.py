"""Test --micro-batch-size auto: the choice from given rates, and real runs that choose, resume with
the choice, and refuse impossible settings.
"""

import dataclasses
import json
import sys
from types import SimpleNamespace

import h5py
import pytest
import torch

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.task import Job
from megatron_interbert.training import micro_batch
from megatron_interbert.training.micro_batch import choose_micro_batch, still_fits
from megatron_interbert.training.model_plan import ModelPlan
from tests.corpus import write_store
from tests.launching import launch, losses, pretrain, train
from tests.sizes import SMALL


class Pretended:
    """Simulate a trial whose passes take `seconds(n)` per sample and where `room` samples fit."""

    def __init__(self, seconds, room=10**9, **settings):
        self.config = RunConfig(**settings)
        self.state = ParallelState()
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.each = seconds
        self.room = room
        self.tried = []

    def batch(self, samples):
        return samples

    def fits(self, batch, room):
        return batch <= self.room

    def seconds(self, model, batch):
        self.tried.append(batch)
        return self.each(batch) * batch


def choose(trial, global_batch):
    return choose_micro_batch(trial, lambda: torch.nn.Linear(1, 1), global_batch, lambda: None)


def test_the_largest_of_the_fastest_that_divides_and_fits():
    saturating = Pretended(lambda samples: 1.0 + 8.0 / samples)
    saturating.each = lambda samples: (1.0 + 8.0 / samples) / 1000
    assert choose(saturating, 192) == 192
    assert saturating.tried == [1, 2, 4, 8, 16, 32, 64, 192]
    assert choose(Pretended(saturating.each, room=50), 192) == 32
    slower_when_large = Pretended(lambda samples: abs(samples - 8) / 1000 + 0.001)
    assert choose(slower_when_large, 4096) == 8
    assert slower_when_large.tried == [
        1,
        2,
        4,
        8,
        16,
        32,
        64,
    ], "three sizes in a row were no better"
    hiccup = Pretended(lambda samples: 0.1 if samples in (2, 4) else 0.01)
    assert choose(hiccup, 64) == 64, "two bad measurements do not decide"
    assert choose(Pretended(lambda samples: 0.01), 30) == 30, "as fast: the largest"
    long = Pretended(lambda samples: micro_batch.LONGEST_TRIAL / 3)
    assert choose(long, 64) == 4
    assert long.tried == [1, 2, 4]


def test_routing_groups_are_not_cut():
    groups = {"balance_coefficient": 0.1, "data_partitions": 2, "routing_group": 8}
    grouped = Pretended(lambda samples: 0.01, room=100, **groups)
    assert choose(grouped, 192) == 64
    assert grouped.tried == [16, 32, 64]
    with pytest.raises(UsageError, match=r"share of the global batch, 40 samples, would cut .* 16"):
        choose(grouped, 40)


def test_a_trial_that_runs_out_of_memory_ends_the_search():
    """Check that, if the prediction was wrong, all ranks take the next smaller size."""
    trial = Pretended(lambda samples: 0.01)
    trial.seconds = lambda model, batch: None if batch > 8 else 0.01
    assert choose(trial, 64) == 8


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("HIP error: out of memory"),
        RuntimeError("NCCL error: Cuda failure 2 'out of memory'"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_lack_of_memory_is_noticed_and_nothing_else(error):
    trial = object.__new__(micro_batch.Trial)
    trial.state = ParallelState()
    trial.device = torch.device("cpu")
    task = SimpleNamespace(count_targets=lambda batch: torch.zeros(1), loss=None)
    trial.job = SimpleNamespace(task=task)
    batch = SimpleNamespace(to=lambda device: batch)

    def passes(batch):
        raise error

    passes.zero_grad = lambda: None
    assert trial.seconds(passes, batch) is None
    error.args = ("shape mismatch",)
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="shape mismatch"):
            trial.seconds(passes, batch)


def test_nothing_to_choose_from():
    with pytest.raises(UsageError, match="--micro-batch-size auto needs --global-batch-size"):
        choose(Pretended(lambda samples: 1.0), 0)
    with pytest.raises(UsageError, match=r"not one sample fits .* interbert plan"):
        choose(Pretended(lambda samples: 1.0, room=0), 8)


def test_runs_choose_together_and_resume_with_it(tmp_path):
    """Check on two data-parallel ranks that a resumed run has the losses of the uninterrupted one,
    to the bit.
    """
    store = write_store(tmp_path / "s")
    (tmp_path / "ds.json").write_text(
        '{"train_batch_size": 24, "zero_optimization": {"stage": 2}}'
    )  # these settings hold in the trial too
    common = (
        "--model",
        "tiny",
        "--data-path",
        store,
        "--data-partitions",
        4,
        "--deepspeed_config",
        tmp_path / "ds.json",
        "--train-iters",
        4,
        "--log-interval",
        1,
        "--num-workers",
        0,
    )
    code, out, err = train(
        2, *common, "--micro-batch-size", "auto", "--save", tmp_path / "cut", "--exit-interval", 2
    )
    assert code in (0, 75), out + err
    (line,) = [line for line in out.splitlines() if line.startswith("micro-batch size")]
    chosen = int(line.split()[2])
    assert 12 % chosen == 0
    assert "of 12 per rank, by trial (samples/s" in line
    assert f"batch: 24 = micro {chosen} x DP 2" in out
    code, out, err = train(2, *common, "--micro-batch-size", "auto", "--save", tmp_path / "cut")
    assert code == 0, out + err
    assert "by trial" not in out
    assert f"micro-batch size {chosen}, as the previous run chose" in out
    assert f"batch: 24 = micro {chosen} x DP 2" in out
    code, out, err = train(2, *common, "--micro-batch-size", chosen, "--save", tmp_path / "whole")
    assert code == 0, out + err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_at_stage_3_no_rank_holds_the_whole(tmp_path):
    """Check that trials there build a few layers of a deep model, and that the run has them all."""
    store = write_store(tmp_path / "s")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "image_attention_heads": 2}
    sizes |= {"ffn_hidden_size": 64, "pooled_size": 32, "interaction_layers": 5, "text_layers": 1}
    sizes |= {"image_layers": 3, "vocab_size": 0, "feature_dim": 0, "num_classes": 0}
    (tmp_path / "deep.json").write_text(json.dumps(sizes))
    flags = ("--model", tmp_path / "deep.json", "--data-path", store, "--train-iters", 1)
    flags = (*flags, "--zero-stage", 3, "--global-batch-size", 8, "--micro-batch-size", "auto")
    code, out, err = train(2, *flags, "--data-partitions", 4)
    assert code == 0, out + err
    assert "trials take at most 2 layers of each stack: no rank holds all" in out
    assert "per rank, by trial (samples/s" in out
    assert "layers 5 + 1 + 3" in out

    sizes = dataclasses.replace(SMALL, interaction_layers=5)
    plan = ModelPlan(Job(None, None, sizes, (), {}, ""), ParallelState(), None, 0, False)
    shallow = plan.shallow().job.model_config
    found = (shallow.interaction_layers, shallow.text_layers, shallow.image_layers)
    assert found == (2, 1, 2)
    assert plan.job.model_config.interaction_layers == 5


def test_what_a_run_before_chose_must_fit_here():
    trial = Pretended(lambda samples: 0.01, room=16)
    assert still_fits(trial, 16)
    assert not still_fits(trial, 24)


def test_a_bad_record_in_a_trial_is_named(tmp_path):
    """Check that the rank that reads a bad record names it."""
    store = write_store(tmp_path / "s")
    shard = next(store.glob("*.h5"))
    with h5py.File(shard, "r+") as file:
        file["image_sizes"][:] = 0

    code, out, err = train(
        2,
        "--model",
        "tiny",
        "--data-path",
        store,
        "--data-partitions",
        4,
        "--global-batch-size",
        24,
        "--train-iters",
        2,
        "--num-workers",
        0,
        "--micro-batch-size",
        "auto",
    )
    assert code == 2, out + err
    assert shard.name in err
    assert "Traceback" not in err


def test_what_cannot_be_found_out_is_one_line(tmp_path):
    store = write_store(tmp_path / "s")
    (tmp_path / "run.yaml").write_text("micro_batch_size: auto\n")
    flags = ("--model", "tiny", "--data-path", store, "--data-partitions", 4, "--train-iters", 2)
    code, _, err = launch(*pretrain(*flags, "--config", tmp_path / "run.yaml"))
    assert (code, err.strip().splitlines()[-1]) == (
        2,
        "error: --micro-batch-size auto needs --global-batch-size, which it divides",
    )
    code, _, err = launch(*pretrain(*flags, "--micro-batch-size", "many"))
    assert (code, err.strip().splitlines()[-1]) == (
        2,
        "error: --micro-batch-size: 'many', expected a whole number or auto",
    )
    (tmp_path / "ds.json").write_text(
        '{"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}'
    )
    code, _, err = launch(
        *pretrain(*flags, "--micro-batch-size", "auto", "--deepspeed_config", tmp_path / "ds.json")
    )
    assert code == 2
    assert "--micro-batch-size is auto, but" in err.strip().splitlines()[-1]
    (tmp_path / "ds.json").write_text('{"gradient_accumulation_steps": 2}')
    code, _, err = launch(
        *pretrain(*flags, "--micro-batch-size", "auto", "--deepspeed_config", tmp_path / "ds.json")
    )
    assert code == 2
    assert (
        "gradient_accumulation_steps is 2, but that follows from --micro-batch-size auto"
        in err.strip().splitlines()[-1]
    )
    code, _, err = launch(
        *pretrain(*flags, "--micro-batch-size", "auto", "--global-batch-size", 8, "--deterministic")
    )
    assert code == 2
    assert "trials do not choose the same every time" in err.strip().splitlines()[-1]
    command = (
        sys.executable,
        "-m",
        "megatron_interbert.preflight",
        *flags,
        "--micro-batch-size",
        "auto",
        "--global-batch-size",
        8,
    )
    code, out, err = launch(*command)
    assert code == 0, out + err
    assert "micro-batches by trial when the run starts" in out
    code, _, err = launch(*pretrain(*flags, "--micro-batch-size", -1))
    assert (code, err.strip().splitlines()[-1]) == (
        2,
        "error: --micro-batch-size is -1, expected 1 or more",
    )
    code, _, err = launch(*pretrain(*flags, "--micro-batch-size", 0))
    assert (code, err.strip().splitlines()[-1]) == (
        2,
        "error: --micro-batch-size is 0, expected 1 or more",
    )
