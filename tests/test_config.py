"""Test command line and YAML: both spellings, precedence, suggestions for unknown names."""

import math

import pytest

from megatron_interbert.command_line import build_parser, parse, with_dashes
from megatron_interbert.commands.convert import Options as ConvertOptions
from megatron_interbert.config.model import ModelConfig, model_config_from_dict
from megatron_interbert.config.options import AUTO, rows
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.model.presets import PRESETS, load_model_config
from megatron_interbert.tasks.pretraining.job import config_of_validation
from megatron_interbert.tasks.registry import EVALUATED, FINETUNED
from megatron_interbert.tasks.retrieval.config import EvaluateRetrievalConfig, RetrievalConfig
from megatron_interbert.training.deepspeed_config import merge


def read(*argv):
    return parse(RunConfig, "test", argv)


def test_dashes_and_underscores_mean_the_same():
    assert read("--micro_batch_size", "3", "--data_path=a_b").data_path == "a_b"
    assert read("--micro-batch-size", "3").micro_batch_size == 3
    assert read("--local_rank=1", "--bf16").bf16
    assert not read("--no-dropout").dropout


def test_flags_of_another_command_are_named_as_such():
    with pytest.raises(UsageError, match="'--balance-coefficient', which pretrain takes, not this"):
        parse(RetrievalConfig, "test", ["--balance-coefficient", "0.01"])
    with pytest.raises(UsageError, match="'--expert-parallel-size', which pretrain and finetune t"):
        parse(EvaluateRetrievalConfig, "test", ["--expert-parallel-size", "2"])
    with pytest.raises(UsageError, match="'--no-balance-tokens', which pretrain takes"):
        parse(EvaluateRetrievalConfig, "test", ["--no-balance-tokens"])
    with pytest.raises(UsageError, match=r"'--lrr' \(did you mean '--lr'\?\)"):
        parse(RetrievalConfig, "test", ["--lrr", "1"])


def routing(ranks, *argv, samples=100_000):
    """Return a run with a balance loss and its settings fitted to ranks and data."""
    config = read("--experts", "4", "--balance-coefficient", "0.1", *argv)
    config.data_parallel_size = ranks
    config.fit_partitions(samples)
    config.fit_batches(ranks)
    config.check_routing_groups()

    return config


@pytest.mark.parametrize(
    ("ranks", "argv", "partitions", "micro_batch"),
    [
        (1, [], 1, 64),
        (2, ["--micro-batch-size", "64"], 2, 64),
        (1, ["--micro-batch-size", "128"], 2, 128),
        (2, ["--micro-batch-size", "192"], 2, 192),
        (3, ["--micro-batch-size", "256"], 12, 256),
        (2, ["--global-batch-size", "1024"], 2, 64),
        (4, ["--global-batch-size", "768"], 4, 64),
        (1, ["--micro-batch-size", "8192"], 64, 8192),
        (256, ["--micro-batch-size", "128"], 256, 128),
        (2, ["--micro-batch-size", "256", "--data-partitions", "4"], 4, 256),
        (2, ["--routing-group", "8", "--micro-batch-size", "32"], 8, 32),
    ],
)
def test_defaults_hold_whole_routing_groups(ranks, argv, partitions, micro_batch):
    config = routing(ranks, *argv)
    assert (config.data_partitions, config.micro_batch_size) == (partitions, micro_batch)


def test_resumed_defaults_hold_whole_routing_groups():
    config = read("--experts", "4", "--balance-coefficient", "0.1")
    config.data_parallel_size = 1
    config.settle("data_partitions", 2, "run/global_step8")
    config.settle("global_batch_size", 128, "the checkpoint")
    config.fit_partitions(1000)
    config.fit_batches(1)
    assert (config.data_partitions, config.micro_batch_size) == (2, 128)


@pytest.mark.parametrize(
    ("ranks", "argv", "said"),
    [
        (
            2,
            ["--micro-batch-size", "48"],
            r"--micro-batch-size 48 would .* multiple of 64 = --data-partitions 2 \(fitted\) / .*;"
            " give another --micro-batch-size or, in a new run, a smaller --routing-group$",
        ),
        (
            2,
            ["--micro-batch-size", "128", "--data-partitions", "64"],
            "multiple of 2048 = .* in a new run, --data-partitions 2 or a smaller --routing-group$",
        ),
        (
            1,
            ["--global-batch-size", "96"],
            "share of the global batch, 96 samples, would .* give another --global-batch-size or",
        ),
    ],
)
def test_cut_routing_groups_are_refused(ranks, argv, said):
    with pytest.raises(UsageError, match=said):
        routing(ranks, *argv)


def test_a_json_that_accumulates_gets_whole_routing_groups(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"gradient_accumulation_steps": 4}')
    config = read("--experts", "4", "--balance-coefficient", "0.1", "--deepspeed-config", str(file))
    merge(config, 1)
    assert (config.micro_batch_size, config.global_batch_size) == (64, 256)


def test_validation_has_the_same_samples_on_any_number_of_ranks():
    for ranks in (1, 2, 4):
        config = read("--experts", "4", "--balance-coefficient", "0.1", "--data-partitions", "8")
        config.data_parallel_size = ranks
        assert config_of_validation(config).fit_partitions(10_000) == 8
        assert config.told("data_partitions") == "--data-partitions 8"


def test_micro_batches_of_a_large_share():
    config = read("--global-batch-size", str(10**12))
    config.fit_batches(1)
    assert config.micro_batch_size == 32


def test_yaml_below_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-4\nmicro-batch-size: 7\nbf16: true\n")
    config = read("--config", str(file), "--micro-batch-size", "9")
    assert (config.lr, config.micro_batch_size, config.bf16) == (1e-4, 9, True)
    assert config.given == {"lr", "micro_batch_size", "bf16"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1\n", r"unknown key 'lrr' \(did you mean 'lr'"),
        ("train_iters: many\n", "'train_iters' is 'many', expected int"),
        ("train_iters: true\n", "expected int"),
        ("masking: mine\n", "expected one of paper, official"),
        ("lr: fast\n", "'lr' is 'fast', expected a number"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read("--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--micro-batchsize", "3"],
            r"unknown argument '--micro-batchsize' \(did you mean '--micro-batch-size'",
        ),
        (["--masking", "mine"], "'mine', expected one of paper, official"),
        (["--train-iters", "x"], "'x', expected a whole number"),
        (["--config", "/nowhere.yaml"], "cannot read /nowhere.yaml"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(UsageError, match=message):
        read(*argv)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--fp16", "--bf16"], "exclude each other"),
        (["--train-iters", "0"], "expected 1 or more"),
        (["--max-tokens", "2"], "expected 3 or more"),
        (["--objectives", "msm,itn"], "unknown 'itn'"),
    ],
)
def test_values_without_meaning(changes, message):
    with pytest.raises(UsageError, match=message):
        read(*changes).check()


def test_batch_arithmetic():
    config = RunConfig(micro_batch_size=4, global_batch_size=32)
    assert [config.accumulation_steps(ranks) for ranks in (1, 2, 8)] == [8, 4, 1]
    assert RunConfig(micro_batch_size=4).global_batch(3) == 12
    with pytest.raises(UsageError, match="not a multiple"):
        config.accumulation_steps(3)


def test_model_files_and_presets(tmp_path):
    (tmp_path / "m.json").write_text('{"hidden_size": 96}')
    assert load_model_config(str(tmp_path / "m.json")).hidden_size == 96
    with pytest.raises(UsageError, match="did you mean 'base'"):
        load_model_config("bass")
    with pytest.raises(
        UsageError, match=r"unknown model key 'hiden_size' \(did you mean 'hidden_size'"
    ):
        model_config_from_dict({"hiden_size": 1}, "x")

    with pytest.raises(UsageError, match="not a multiple of num_attention_heads"):
        ModelConfig(hidden_size=100)
    with pytest.raises(UsageError, match="--tensor-model-parallel-size 5 does not divide"):
        PRESETS["base"].check_tensor_parallel(5)

    assert PRESETS["base"].padded_vocab_size == 30592


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--lr", "-1"), "--lr -1.0: expected 0 or more"),
        (("--adam-beta1", "1"), "--adam-beta1 1.0: expected 0 or more and below 1"),
        (("--adam-beta2=-0.1",), "--adam-beta2 -0.1: expected 0 or more and below 1"),
        (("--ema-decay", "1"), "--ema-decay 1.0: expected 0 or more and below 1"),
        (("--lr-warmup-fraction", "1.5"), "--lr-warmup-fraction 1.5: expected 0 to 1"),
        (("--hard-negatives", "2"), "--hard-negatives 2.0: expected 0 to 1"),
        (("--train-iters", "9" * 30), "--train-iters: expected a number of fewer than 20 digits"),
        (("--weight-decay=-1e-9",), "--weight-decay -1e-09: expected 0 or more"),
    ],
)
def test_numbers_outside_their_limits_are_refused(given, expected):
    """Check values that would otherwise end in a traceback later, in torch or out of memory."""
    with pytest.raises(UsageError) as told:
        parse(RunConfig, "", given).check()
    assert str(told.value) == expected


@pytest.mark.parametrize("value", [None, "64", True, -1, 1.5, [64], {}, 10**30])
@pytest.mark.parametrize(
    "name", ["hidden_size", "num_attention_heads", "text_layers", "vocab_size"]
)
def test_sizes_that_no_model_can_have(name, value):
    with pytest.raises(UsageError, match=f"model: {name} is .*expected a whole number from"):
        model_config_from_dict({name: value}, "sizes.json")


@pytest.mark.parametrize("value", [None, "0.1", True, -0.1, 1.0, math.nan, math.inf, []])
def test_dropouts_that_no_model_can_have(value):
    with pytest.raises(
        UsageError, match=r"model: hidden_dropout is .*expected a number from 0 up to 1"
    ):
        model_config_from_dict({"hidden_dropout": value}, "sizes.json")


TRAINED = [RunConfig, *(config for config, _ in FINETUNED.values())]
USED = [config for config, _ in EVALUATED.values()]


@pytest.mark.parametrize("config", TRAINED)
def test_each_setting_of_a_run_says_what_a_resume_does_with_it(config):
    assert [name for name, facts in rows(config) if facts.resume is None] == []


@pytest.mark.parametrize("config", [*TRAINED, *USED])
def test_where_machines_may_differ(config):
    """Check that paths of data may differ, but not what samples or scores depend on."""
    may = {name for name, facts in rows(config) if facts.may_differ}
    assert may >= {"data_path", "vocab_file"}
    assert not may & {"annotations", "queries", "seed", "max_tokens", "precision"}


@pytest.mark.parametrize("config", [*TRAINED, *USED])
def test_help_has_each_flag_once_in_a_group(config):
    text = build_parser(config, "about").format_help()
    for name, facts in rows(config):
        words = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
        shown = name.replace("_", "-")
        assert sum(word in (f"--{shown}", f"--[no-]{shown}") for word in words) == 1, name
        assert not any(old in words for old in facts.old_names)

    assert "--local-rank" not in text
    assert [line for line in text.splitlines() if line.endswith(":") and line[0] != " "][
        1
    ] == "data:"


def test_old_names_are_still_accepted(tmp_path):
    assert read("--tp", "2").tensor_model_parallel_size == 2
    (tmp_path / "run.yaml").write_text("tp: 4\n")
    assert read("--config", str(tmp_path / "run.yaml")).tensor_model_parallel_size == 4


def test_values_that_look_like_flags_are_left_alone():
    given = "--vocab-file my_vocab.txt --lr 2e-3"
    words = ["STUDY", "--pretrain_flags", given, f"--finetune_flags={given}"]
    assert [with_dashes(word) for word in words] == [
        *("STUDY", "--pretrain-flags", given, f"--finetune-flags={given}")
    ]


def test_wrong_flags_are_compared_with_what_can_be_written():
    for wrong, near in (("--list-onyl", "--list"), ("--form", "--from")):
        with pytest.raises(UsageError, match=rf"'{wrong}' \(did you mean '{near}'"):
            parse(ConvertOptions, "about", ["model.bin", wrong])


def test_yaml_takes_flags_as_they_are_written_and_each_once(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("from: official\nlist: true\ntp: 2\n")
    options = parse(ConvertOptions, "about", ["model.bin", "--config", str(file)])
    assert (options.source, options.list_only) == ("official", True)
    assert options.tensor_model_parallel_size == 2

    file.write_text("tp: 2\ntensor-model-parallel-size: 4\n")
    with pytest.raises(UsageError, match="sets --tensor-model-parallel-size a second time"):
        parse(ConvertOptions, "about", ["model.bin", "--config", str(file)])


def test_only_settings_that_may_be_auto_are_called_so():
    config = parse(RunConfig, "about", [f"--lr={float(AUTO)}"])
    with pytest.raises(UsageError, match="--lr -"):
        config.check()
