"""Test flags against DeepSpeed's JSON: "auto" is resolved, conflicts and unknown keys are refused,
the latter with the nearest known name.
"""

import json
from pathlib import Path

import pytest

from megatron_interbert.command_line import parse
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.training.deepspeed_config import merge

TEMPLATES = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


def merged(tmp_path, values, *flags, ranks=2):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(values))
    config = parse(RunConfig, "test", ["--deepspeed_config", str(file), *flags])
    return config, merge(config, ranks)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda p: p.stem)
def test_templates_hold_no_auto_after_merging(template, tmp_path):
    config = parse(
        RunConfig,
        "test",
        [
            "--deepspeed_config",
            str(template),
            "--micro-batch-size",
            "4",
            "--global-batch-size",
            "16",
            *(("--nvme-path", str(tmp_path)) if "nvme" in template.stem else ()),
        ],
    )
    result = merge(config, 2)
    assert '"auto"' not in json.dumps(result)
    assert (result["train_micro_batch_size_per_gpu"], result["gradient_accumulation_steps"]) == (
        4,
        2,
    )
    assert (
        result["zero_optimization"]["stage"]
        == config.zero_stage
        == json.loads(template.read_text())["zero_optimization"]["stage"]
    )


def test_templates_are_found_by_name_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero2").mkdir()
    for name in ("zero2", "zero3"):
        config = parse(RunConfig, "test", ["--deepspeed-config", name])
        assert merge(config, 2)["zero_optimization"]["stage"] == int(name[-1])

    with pytest.raises(UsageError, match=r"zero9: no such file \(did you mean .* of cpu, zero0"):
        merge(parse(RunConfig, "test", ["--deepspeed-config", "zero9"]), 1)


def test_json_values_reach_the_run(tmp_path):
    config, result = merged(
        tmp_path,
        {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 3,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": 3e-4, "betas": [0.8, 0.9], "weight_decay": 0.1},
            },
        },
    )
    assert (config.micro_batch_size, config.global_batch_size, config.clip_grad) == (8, 48, 0.5)
    assert (config.bf16, config.zero_stage, config.lr, config.weight_decay) == (True, 2, 3e-4, 0.1)
    assert (config.adam_beta1, config.adam_beta2) == (0.8, 0.9)
    assert result["gradient_clipping"] == 0.5
    assert "optimizer" not in result


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        (
            {"zero_optimisation": {"stage": 2}},
            [],
            r"unknown DeepSpeed key 'zero_optimisation' \(did you mean 'zero_optimization'",
        ),
        (
            {"zero_optimization": {"stge": 2}},
            [],
            r"unknown key 'stge' in 'zero_optimization' \(did you mean 'stage'",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            [],
            "unknown key 'devise' in 'zero_optimization.offload_optimizer'",
        ),
        ({"fp16": {"loss_scale_windo": 1}}, [], "did you mean 'loss_scale_window'"),
        (
            {"optimizer": {"params": {"weigth_decay": 0.5}}},
            [],
            r"unknown key 'weigth_decay' in 'optimizer.params' \(did you mean",
        ),
        ({"fp16": True}, [], "'fp16' is True, expected an object"),
        ({"zero_optimization": 2}, [], "'zero_optimization' is 2, expected an object"),
        (
            {"zero_optimization": {"stage": 7}},
            [],
            "zero_optimization.stage is 7, expected one of 0, 1, 2, 3",
        ),
        ({"gradient_clipping": "one"}, [], "gradient_clipping is 'one', expected float"),
        ({"scheduler": {"type": "WarmupLR"}}, [], "--lr-decay-style"),
        ({"optimizer": {"type": "Lamb"}}, [], "optimizer type 'Lamb', expected 'AdamW'"),
        (
            {"zero_optimization": {"stage": 2}},
            ["--zero-stage", "1"],
            "--zero-stage is 1, but .* zero_optimization.stage = 2",
        ),
        (
            {"gradient_clipping": 0.1},
            ["--clip_grad", "1.0"],
            "--clip-grad is 1.0, but .* gradient_clipping = 0.1",
        ),
        (
            {"optimizer": {"params": {"lr": 0.1}}},
            ["--lr", "0.2"],
            "--lr is 0.2, but .* optimizer.params.lr = 0.1",
        ),
        (
            {"gradient_accumulation_steps": 4},
            ["--micro-batch-size", "2", "--global-batch-size", "8"],
            "gradient_accumulation_steps is 4",
        ),
        (
            {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4},
            [],
            "--global-batch-size 10 .*ds.json. is not a multiple of",
        ),
        (
            {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
            [],
            "--fp16 and --bf16 exclude each other",
        ),
    ],
)
def test_conflicts_and_unknown_keys(tmp_path, values, flags, message):
    with pytest.raises(UsageError, match=message):
        merged(tmp_path, values, *flags)


def test_equal_values_are_no_conflict(tmp_path):
    assert (
        merged(tmp_path, {"zero_optimization": {"stage": 2}}, "--zero-stage", "2")[0].zero_stage
        == 2
    )


def test_broken_json_is_one_line(tmp_path):
    (tmp_path / "bad.json").write_text("{,}")
    with pytest.raises(UsageError, match=r"bad.json is not valid JSON"):
        merge(parse(RunConfig, "test", ["--deepspeed-config", str(tmp_path / "bad.json")]), 1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_needs_stage_one(tmp_path, precision):
    with pytest.raises(UsageError, match="--zero-stage 1"):
        merged(tmp_path, {}, f"--{precision}", "--zero-stage", "0")


def test_float8_needs_bfloat16_and_sizes_that_divide(tmp_path):
    config, _ = merged(
        tmp_path, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "--fp8"
    )
    config.check_float8(PRESETS["base"])  # bf16 may come from either
    config.tensor_model_parallel_size = 32

    with pytest.raises(
        UsageError,
        match=r"--fp8: hidden_size 768 of the model is not a multiple of 16 on each of 32",
    ):
        config.check_float8(PRESETS["base"])

    with pytest.raises(UsageError, match="--fp8 needs --bf16"):
        merged(tmp_path, {}, "--fp8")[0].check_float8(PRESETS["base"])
