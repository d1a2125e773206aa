"""Test that defaults are fitted, with a note, and that errors name where a value came from."""

import contextlib
import socket
import sys

import pytest

from megatron_interbert.command_line import parse
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.tasks.glue.config import GlueConfig
from megatron_interbert.tasks.parts import fit_length
from megatron_interbert.training.deepspeed_config import merge
from tests.corpus import write_store
from tests.launching import ROOT, TINY, ends, launch, losses, pretrain, ran, start


def config_of(*flags):
    return parse(RunConfig, "", [str(flag) for flag in flags])


@pytest.mark.parametrize(
    ("samples", "ranks", "expected"),
    [
        (59, 1, 32),
        (59, 2, 32),
        (59, 4, 32),
        (64, 1, 64),
        (10_000, 1, 64),
        (10_000, 6, 48),
        (10_000, 96, 96),
        (7, 6, 6),
        (1, 1, 1),
    ],
)
def test_partitions_fit_samples_and_ranks(samples, ranks, expected):
    config = config_of()
    config.data_parallel_size = ranks
    assert config.fit_partitions(samples) == expected
    assert bool(config.notes) == (expected != 64)
    assert all(
        f"--data-partitions {expected} instead of 64: {samples} samples" in n for n in config.notes
    )


def test_partitions_that_are_asked_for_stay():
    config = config_of("--data-partitions", 64)
    assert config.fit_partitions(59) == 64


def test_lengths_fit_the_positions_of_the_model():
    config = GlueConfig()
    fit_length(config, PRESETS["sample"])
    positions = PRESETS["sample"].max_position_embeddings
    assert config.max_tokens == positions < 128
    assert config.notes == [
        f"note: --max-tokens {positions} instead of 128: the model has {positions} positions"
    ]
    config = parse(GlueConfig, "", ["--max-tokens", "128"])
    with pytest.raises(UsageError, match="--max-tokens 128 is more than the model's"):
        fit_length(config, PRESETS["sample"])


@pytest.mark.parametrize(
    ("flags", "ranks", "micro", "together"),
    [
        ((), 2, 32, 64),
        (("--global-batch-size", 8), 1, 8, 8),
        (("--global-batch-size", 48), 1, 24, 48),
        (("--global-batch-size", 64), 4, 16, 64),
        (("--global-batch-size", 64, "--micro-batch-size", 4), 4, 4, 64),
    ],
)
def test_batches_fit_the_ranks(flags, ranks, micro, together):
    config = config_of(*flags)
    merge(config, ranks)
    assert (config.micro_batch_size, config.global_batch_size) == (micro, together)


def test_batches_of_finetuning_fit_the_ranks():
    """Check a global batch size of 64 on 12 ranks: it becomes 60, with a note."""
    config = GlueConfig(global_batch_size=64)
    merge(config, 12)
    assert (config.micro_batch_size, config.global_batch_size) == (5, 60)
    assert (
        "--global-batch-size 60 instead of 64: 12 data-parallel ranks share it" in config.notes[0]
    )


def test_an_error_names_where_a_number_came_from(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("micro-batch-size: 3\n")
    json = tmp_path / "ds.json"
    json.write_text('{"train_batch_size": 8}')
    config = config_of("--config", file, "--deepspeed_config", json)
    with pytest.raises(UsageError) as raised:
        merge(config, 1)

    assert f"--global-batch-size 8 (from train_batch_size in {json})" in str(raised.value)
    assert f"--micro-batch-size 3 (from {file})" in str(raised.value)

    config = config_of("--micro-batch-size", 3)
    with pytest.raises(UsageError, match=r"--global-batch-size 8 \(from the checkpoint\) is not"):
        merge(config, 1, resumed_batch=8)


@pytest.mark.parametrize(
    ("flags", "processes", "stage"),
    [((), 1, 0), ((), 2, 1), (("--bf16",), 1, 1), (("--zero-stage", 2), 1, 2)],
)
def test_one_process_in_fp32_shares_nothing(flags, processes, stage):
    config = config_of(*flags)
    config.fit_zero_stage(processes)
    assert config.zero_stage == stage


def test_a_small_store_trains_by_default_and_resumes(tmp_path):
    """Train on 59 captions without fitting flags; resuming reports the longer schedule."""
    store = write_store(tmp_path / "store", images=59, captions_each=1)
    flags = (
        "--data-path",
        store,
        "--model",
        "tiny",
        "--save",
        tmp_path / "run",
        "--log-interval",
        1,
    )
    out = ran(*pretrain(*flags, "--train-iters", 2, "--global-batch-size", 6))
    assert "note: --data-partitions 32 instead of 64: 59 samples, 1 data-parallel rank" in out
    assert "note: --micro-batch-size 6 instead of 32" in out
    out = ran(*pretrain(*flags, "--train-iters", 8))
    assert "batch: 6 = micro 6" in out
    assert (
        "2 steps become 8: the learning rate was 5.00e-05 at step 2 and is 8.57e-05 at step 3"
        in out
    )
    assert "ZeRO-0, fp32" in out
    assert sorted(losses(tmp_path / "run")) == [*range(1, 9)]


@contextlib.contextmanager
def port_of_deepspeed_taken():
    """Listen on the port that DeepSpeed's launcher uses by default, unless it is taken already."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server(("127.0.0.1", 29500)))
        yield


def test_the_users_own_command_on_a_fresh_checkout(tmp_path):
    """Run `deepspeed launchers/pretrain.sh` on two ranks without a corpus; then twice at once."""
    command = ("deepspeed", "--num_gpus", 2, ROOT / "launchers/pretrain.sh", "--deepspeed")
    code, out, err = launch(*command, "--train-iters", 3, "--log-interval", 1, cwd=tmp_path)
    assert code == 0, out + err
    assert "sample_corpus is missing: it is generated first, by interbert make-sample" in out
    assert "no --save: nothing will be kept" in out
    assert "train step 3/3" in out
    assert "resume" not in out + err

    with port_of_deepspeed_taken():
        both = [
            start(*command, "--train-iters", 3, "--save", tmp_path / name, cwd=tmp_path)
            for name in ("first", "second")
        ]
        for code, out, err in ends(both):
            assert code == 0, out + err
            assert "layout: DP2 x TP1 (2 ranks, gloo)" in out

    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_preflight_takes_the_same_defaults(tmp_path):
    store = write_store(tmp_path / "store", images=59, captions_each=1)
    command = (sys.executable, "-m", "megatron_interbert.preflight", "--data-path", store)
    out = ran(*command, *TINY[:2], "--global-batch-size", 8, "--world-size", 2)
    assert "global batch 8 = micro 4 x DP 2" in out
    assert out.rstrip().endswith("ready")


def test_a_default_global_batch_fits_a_given_micro_batch(tmp_path):
    config = parse(GlueConfig, "", ["--micro-batch-size", "24"])
    merge(config, 1)
    assert config.global_batch_size == 24
    assert "with --micro-batch-size 24" in config.notes[0]

    json = tmp_path / "ds.json"
    json.write_text('{"gradient_accumulation_steps": 4}')
    config = parse(GlueConfig, "", ["--deepspeed_config", str(json)])
    merge(config, 2)
    assert config.global_batch_size == 4 * 32 * 2


def test_partitions_that_fit_are_left_alone():
    """Check that a validation set with 48 partitions keeps them on any number of ranks that divides
    48.
    """
    for ranks in (1, 2, 3, 4):
        config = RunConfig(data_partitions=48)
        config.data_parallel_size = ranks
        assert config.fit_partitions(200) == 48
