"""Test that preflight refuses meaningless flags before it checks anything; tests/test_launch.py
tests what it finds later.
"""

import json
import re
import sys
from pathlib import Path

import pytest

from megatron_interbert.preflight import PreflightConfig
from megatron_interbert.training import trial_step
from tests.corpus import write_store
from tests.launching import TINY, launch
from tests.training.test_room import HUGE
from tests.training.test_swap import needs_built_library


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--world-size", -1), "error: --world-size is -1, expected 0 or more"),
        (("--lr", -1), "error: --lr -1.0: expected 0 or more"),
        (("--micro-batch-size", 0), "error: --micro-batch-size is 0, expected 1 or more"),
    ],
)
def test_numbers_without_meaning_are_refused_at_once(flags, line):
    code, out, err = launch(
        sys.executable, "-m", "megatron_interbert.preflight", "--data-path", "none", *flags
    )
    assert (code, out, err.strip()) == (2, "", line)


def test_a_trial_needs_a_batch_to_divide(tmp_path):
    store = write_store(tmp_path / "store")
    command = (
        sys.executable,
        "-m",
        "megatron_interbert.preflight",
        "--data-path",
        store,
        *TINY,
        "--fast",
    )
    code, out, err = launch(*command, "--micro-batch-size", "auto", "--global-batch-size", 0)
    assert code == 2, out + err
    assert (
        "FAILED  batch        --micro-batch-size auto needs --global-batch-size, which it divides"
        in out
    )
    assert "-       step         not tried: it needs 'batch'" in out


def test_the_trial_has_a_deepspeed_json_of_its_own_for_as_long_as_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given.json"
    given.write_text(json.dumps({"train_batch_size": 8, "gradient_clipping": 0.5}))
    last = []
    monkeypatch.setattr(trial_step, "at_end", last.append)
    alone = trial_step.config_of_one_process(PreflightConfig(deepspeed_config=str(given)))
    own = Path(alone.deepspeed_config)
    assert json.loads(own.read_text()) == {"gradient_clipping": 0.5}
    assert own != given

    last.pop()()
    assert not own.parent.exists()
    assert given.exists()


@needs_built_library
def test_the_step_is_tried_where_the_model_fits(tmp_path: Path) -> None:
    """Check that the step of a model that is too large is refused or left out, and that offload to
    a disk leaves nothing there.
    """
    store = write_store(tmp_path / "store")
    (tmp_path / "nvme").mkdir()
    command = (sys.executable, "-m", "megatron_interbert.preflight", "--data-path", store, "--fast")
    to_disk = ("--bf16", "--deepspeed-config", "zero3_nvme", "--nvme-path", tmp_path / "nvme")

    code, out, err = launch(*command, *TINY, *to_disk, "--world-size", 2)
    assert code == 0, out + err
    assert "ZeRO-3, offload of optimizer to nvme and parameters to nvme" in out
    assert "ok      step         losses msm" in out
    assert not list((tmp_path / "nvme").iterdir())

    sizes = tmp_path / "huge.json"
    sizes.write_text(json.dumps(HUGE))
    large = ("--model", sizes, "--micro-batch-size", 1)
    code, out, err = launch(*command, *large, "--bf16", "--world-size", 2)
    assert code == 2, out + err
    assert re.search(r"FAILED  step +a rank needs [\d.]+ GiB .* by prediction; no layout of", out)

    code, out, err = launch(*command, *large, *to_disk, "--zero-stage", 3, "--world-size", 4096)
    assert code == 0, out + err
    assert re.search(r"ok      step +not tried: one process, which holds .* needs [\d.]+ GiB", out)


def test_the_step_of_one_process_in_secondary_groups(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    json_of_run = tmp_path / "ds.json"
    zero = {"stage": 3, "zero_hpz_partition_size": 2}
    json_of_run.write_text(json.dumps({"zero_optimization": zero}))
    flags = ("--data-path", store, "--fast", *TINY, "--bf16", "--deepspeed-config", json_of_run)
    command = (sys.executable, "-m", "megatron_interbert.preflight", *flags)
    code, out, err = launch(*command, "--world-size", 4)
    assert code == 0, out + err
    assert "ok      step         losses" in out


def test_a_run_with_experts(tmp_path: Path) -> None:
    """Check the step of one process with all experts, and what the run's ranks must divide."""
    flags = ("--data-path", write_store(tmp_path / "store"), "--fast", *TINY, "--experts", 8)
    flags = (*flags, "--micro-batch-size", "auto", "--global-batch-size", 64, "--world-size", 8)
    command = (sys.executable, "-m", "megatron_interbert.preflight", *flags)
    balanced = ("--capacity-factor", 1.25, "--balance-coefficient", 0.01, "--routing-group", 2)
    code, out, err = launch(*command, *balanced, "--expert-parallel-size", 8)
    assert code == 0, out + err
    assert "ok      step         losses" in out

    code, out, err = launch(*command, "--expert-parallel-size", 3)
    assert code == 2, out + err
    assert "--world-size 8 is not a multiple of --expert-parallel-size 3" in out
