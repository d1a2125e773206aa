"""Test that killed runs resume bit for bit, damaged checkpoints are skipped, and a checkpoint of
another run is refused.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.training.resume import check_same_run, newest_settings
from megatron_interbert.training.run_folder import to_prune
from megatron_interbert.weights.manifest import complete_checkpoints, read_manifest, verify
from tests.launching import deepspeed, kill_session, launch, losses, pretrain, start, train
from tests.shared import needs_half_precision

FLAGS = (
    "--model",
    "tiny",
    "--train-iters",
    "14",
    "--micro-batch-size",
    "4",
    "--global-batch-size",
    "16",
    "--data-partitions",
    "8",
    "--log-interval",
    "1",
    "--save-interval",
    "4",
    "--keep-last",
    "2",
    "--num-workers",
    "1",
    "--lr",
    "1e-3",
)


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    """Run all 14 steps without interruption: two processes, ZeRO-1, dropout on."""
    save = tmp_path_factory.mktemp("resume") / "whole"
    code, out, err = train(2, "--data-path", store, "--save", save, *FLAGS)
    assert code == 0, out + err
    return save


def kill_after_step(process, save, step):
    """Kill the session (SIGKILL) once it has saved and metrics.jsonl has reached a step."""
    saved = Path(save) / "latest"
    metrics = Path(save) / "metrics.jsonl"
    shown = re.compile("|".join(f'"step": {later},' for later in range(step, 20)))

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if saved.exists() and metrics.exists() and shown.search(metrics.read_text()):
            kill_session(process)
            return

        time.sleep(0.02)

    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def kill_ranks_of(save):
    """Kill the ranks, which deepspeed started in sessions of their own, and wait for them."""
    ranks = []
    for process in psutil.process_iter(["cmdline"]):
        if str(save) in (process.info["cmdline"] or []) and process.pid != os.getpid():
            ranks.append(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    psutil.wait_procs(ranks, timeout=20)


def test_sigkill_and_the_same_command_again(store, undisturbed, tmp_path):
    save = tmp_path / "killed"
    command = deepspeed(2, "--data-path", store, "--save", save, *FLAGS)
    kill_after_step(start(*command), save, 6)
    kill_ranks_of(save)
    assert (save / "latest").read_text().startswith("global_step")
    code, out, err = launch(*command)
    assert code == 0, out + err
    assert "resumed from" in out
    expected = losses(undisturbed)
    assert sorted(expected) == list(range(1, 15))
    assert losses(save) == expected, (
        "the losses after a kill must be those of the undisturbed run, bit for bit"
    )


def test_what_a_checkpoint_holds(undisturbed):
    assert (undisturbed / "latest").read_text() == "global_step14"
    assert (undisturbed / "latest_checkpointed_iteration.txt").read_text() == "14"
    assert sorted(p.name for p in undisturbed.glob("global_step*")) == [
        "global_step12",
        "global_step14",
    ], "--keep-last 2"
    assert not list(undisturbed.glob(".*partial*")) + list(undisturbed.glob("*.partial"))
    manifest = json.loads((undisturbed / "global_step14" / "manifest.json").read_text())
    assert manifest["consumed_samples"] == 14 * 16
    assert manifest["topology"] == {
        "data_parallel": 2,
        "tensor_parallel": 1,
        "expert_parallel": 1,
        "zero_stage": 1,
    }
    assert manifest["configs"]["run"]["seed"] == manifest["rng"]["seed"] == 1234
    files = {p.name for p in (undisturbed / "global_step14").iterdir()} - {"manifest.json"}
    assert files == set(manifest["files"])


def test_a_finished_run_does_nothing_again(store, undisturbed):
    before = (undisturbed / "global_step14" / "manifest.json").stat().st_mtime
    code, out, err = train(2, "--data-path", store, "--save", undisturbed, *FLAGS)
    assert code == 0, out + err
    assert (undisturbed / "global_step14" / "manifest.json").stat().st_mtime == before


def damaged_copy(undisturbed, tmp_path):
    save = shutil.copytree(undisturbed, tmp_path / "damaged")
    file = next((save / "global_step14").glob("optimizer-*dp-01-of-02*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))

    return save, file.name


def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_taken(store, undisturbed, tmp_path):
    save, name = damaged_copy(undisturbed, tmp_path)
    code, out, err = train(2, "--data-path", store, "--save", save, *FLAGS)
    assert code == 0, out + err
    assert f"global_step14 is damaged ({name} has another sha256)" in out
    assert len(list(save.glob("damaged-global_step14-*"))) == 1, (
        "set aside, not counted among the checkpoints to keep"
    )
    assert sorted(p.name for p in save.glob("global_step*")) == ["global_step12", "global_step14"]
    assert losses(save) == losses(undisturbed)


DAMAGE = {
    "a flipped bit in the manifest": (lambda f: flip(f / "manifest.json", 300), "manifest.json"),
    "a truncated file": (lambda f: os.truncate(weights(f), 4096), "has 4096 bytes, expected"),
    "a deleted shard": (lambda f: weights(f).unlink(), "is missing"),
    "a flipped bit in a header": (lambda f: flip(weights(f), 20), "has another sha256"),
}


def weights(folder):
    return next(folder.glob("weights-*"))


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(bytes(data))


def test_every_damage_is_named_and_the_run_goes_on_elsewhere(store, undisturbed, tmp_path):
    """Check that, among damaged checkpoints and one without a manifest, the oldest, intact one is
    taken; on one process instead of two, without a flag for the global batch size, which is kept.
    """
    save = shutil.copytree(undisturbed, tmp_path / "damaged")
    messages = []

    for number, (damage, message) in enumerate(DAMAGE.values(), 1):
        folder = shutil.copytree(save / "global_step12", save / f"global_step{100 + number}")
        damage(folder)
        messages.append((folder, message))

    shutil.rmtree(save / "global_step14")
    (save / "global_step13").mkdir()
    flags = [
        f
        for f, before in zip(FLAGS, ("", *FLAGS), strict=False)
        if "--global-batch-size" not in (f, before)
    ]
    code, out, err = launch(*pretrain("--data-path", store, "--save", save, *flags))
    assert code == 0, out + err
    for folder, message in messages:
        line = next(line for line in out.splitlines() if f"{folder} is damaged" in line)
        assert message in line

    assert f"note: {save}/global_step13 has no manifest.json" in out
    assert f"resumed from {save}/global_step12" in out
    assert "resharding global_step12: DP2 x TP1, ZeRO-1, fp32 -> DP1 x TP1, ZeRO-0, fp32" in out
    assert "batch: 16 = micro 4 x DP 1 x accumulation 4" in out
    assert len(list(save.glob("damaged-global_step*"))) == len(DAMAGE)
    assert (save / "latest").read_text() == "global_step14"


def test_two_runs_cannot_write_to_one_folder(store, undisturbed, tmp_path):
    import fcntl

    with open(tmp_path / ".lock", "w") as handle:
        fcntl.lockf(handle, fcntl.LOCK_EX)
        print("process 7 on elsewhere", file=handle, flush=True)
        code, _, err = train(2, "--data-path", store, "--save", tmp_path, *FLAGS)

    assert code != 0
    assert "another run writes there (process 7 on elsewhere)" in err


def test_full_disk(store, tmp_path):
    """Check a disk with room for only one checkpoint: the first stays intact, and the run reports
    the failure and ends with code 1.
    """
    save = tmp_path / "small"
    save.mkdir()

    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", save], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a small disk here")

    try:
        code, out, err = train(2, "--data-path", store, "--save", save, *FLAGS, "--keep-last", 0)
        assert code == 1, out + err
        assert "the checkpoint cannot be written" in err
        assert "No space left on device" in err
        assert "Traceback" not in err
        whole = [p for p in save.glob("global_step*") if verify(p) is None]
        assert [p.name for p in whole] == ["global_step4"]
        assert not list(save.glob(".global_step*"))
        shutil.move(save / "global_step4", tmp_path / "kept")
    finally:
        subprocess.run(["umount", "-l", save], check=True)

    shutil.move(tmp_path / "kept", save / "global_step4")
    code, out, err = train(2, "--data-path", store, "--save", save, *FLAGS)
    assert code == 0, out + err
    assert "resumed from" in out


def test_what_is_kept():
    folders = [Path(f"global_step{step}") for step in range(120, 0, -10)]
    names = [int(p.name[11:]) for p in to_prune(folders, keep_last=3, keep_every=40)]
    assert names == [90, 70, 60, 50, 30, 20, 10]
    assert to_prune(folders, keep_last=0, keep_every=0) == []
    assert to_prune(folders, keep_last=12, keep_every=0) == []


REFUSALS = {
    "resume must without any": (
        ("--resume", "must"),
        "empty",
        "--resume must: no complete checkpoint",
    ),
    "resume never over checkpoints": (("--resume", "never"), "whole", "--resume never: "),
    "other masks": (("--max-regions", "5"), "whole", "made with max_regions = 36, this run has 5"),
    "other model sizes": (("--model", "sample"), "whole", "made with other model sizes"),
    "other seed": (("--seed", "5"), "whole", "made with seed = 1234, this run has 5"),
    "other vocabulary": (("--vocab-file", "OTHER"), "whole", "made with another vocabulary"),
    "other vocabulary size": (
        ("--vocab-file", "LONGER"),
        "whole",
        "made with other model sizes (vocab_size 27 against 28",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_checkpoints_of_another_run_are_refused(store, undisturbed, tmp_path, kind):
    flags, where, message = REFUSALS[kind]
    words = (store / "vocab.txt").read_text().replace("cat", "kitten")
    (tmp_path / "OTHER").write_text(words)
    (tmp_path / "LONGER").write_text(words + "more\n")
    flags = [str(tmp_path / f) if f in ("OTHER", "LONGER") else f for f in flags]
    save = (
        shutil.copytree(undisturbed, tmp_path / "whole") if where == "whole" else tmp_path / "empty"
    )
    code, out, err = launch(*pretrain("--data-path", store, "--save", save, *FLAGS, *flags))
    assert code == 2, out + err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in err


LAYOUTS = {
    "TP2 ZeRO-3 bf16": (
        "--tensor-model-parallel-size",
        2,
        "--zero-stage",
        3,
        "--bf16",
        "--recompute-activations",
    ),
    "DP2 ZeRO-2 fp16": ("--zero-stage", 2, "--fp16"),
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(k, marks=needs_half_precision()) if "--fp16" in v else k
        for k, v in LAYOUTS.items()
    ],
)
def test_resume_is_exact_on_other_layouts_too(store, tmp_path, layout):
    """Stop after step 4 and resume, including fp16's loss scale and both random streams."""
    flags = (*FLAGS, "--train-iters", 7, "--micro-batch-size", 4, *LAYOUTS[layout])

    for name, stops in (("whole", [()]), ("halved", [("--exit-interval", 4), ()])):
        for stop in stops:
            code, out, err = train(
                2, "--data-path", store, "--save", tmp_path / name, *flags, *stop
            )
            assert code == 0, out + err

    assert sorted(losses(tmp_path / "whole")) == list(range(1, 8))
    assert losses(tmp_path / "halved") == losses(tmp_path / "whole")


def test_weights_of_another_vocabulary_are_not_taken(store, undisturbed, tmp_path):
    (tmp_path / "vocab.txt").write_text((store / "vocab.txt").read_text().replace("cat", "kitten"))
    flags = ("--vocab-file", tmp_path / "vocab.txt", "--init-from", undisturbed)
    code, _, err = launch(*pretrain("--data-path", store, *FLAGS, *flags))
    assert code == 2
    assert "made with another vocabulary" in err
    code, out, err = launch(*pretrain("--data-path", store, *FLAGS, "--init-from", undisturbed))
    assert code == 0, out + err


def test_load_from_one_folder_save_to_another(store, undisturbed, tmp_path):
    """Check that the first start uses --load, and the next resumes from its own --save."""
    flags = ("--load", undisturbed, "--save", tmp_path / "own", *FLAGS)
    code, out, err = train(
        2, "--data-path", store, *flags, "--train-iters", 16, "--exit-interval", 15
    )
    assert code == 0, out + err
    assert f"resumed from {undisturbed}/global_step14" in out
    code, out, err = train(2, "--data-path", store, *flags, "--train-iters", 16)
    assert code == 0, out + err
    assert f"resumed from {tmp_path / 'own'}/global_step15" in out


def test_a_finished_backup_is_kept_by_the_run_that_loads_it(store, undisturbed, tmp_path):
    """Check that it is saved though nothing is left to train: the backup may go away."""
    own = tmp_path / "own"
    code, out, err = train(2, "--data-path", store, "--load", undisturbed, "--save", own, *FLAGS)
    assert code == 0, out + err
    assert "nothing to train" in out
    assert verify(own / "global_step14") is None


@pytest.mark.parametrize(
    ("before", "now"), [([], ["a"]), (["a"], []), (["a"], ["b"]), (["a"], ["a", "b"])]
)
def test_mined_negatives_that_come_go_or_change_are_another_run(before, now):
    config = RunConfig()
    sizes = ModelConfig()
    data = {"vocabulary": "v", "manifest_sha256": "m", "store": "s", "mined": now}
    configs = {"run": dataclasses.asdict(config), "model": dataclasses.asdict(sizes)}
    manifest = {"configs": configs, "data": {**data, "mined": before}}

    with pytest.raises(
        UsageError, match="mined negatives of s have been added, removed or changed"
    ):
        check_same_run(manifest, config, sizes, data, "x")

    check_same_run({**manifest, "data": data}, config, sizes, data, "x")


def test_a_checkpoint_of_an_older_version_is_of_the_same_run():
    """Check that settings it lacks count as defaults, and others must still agree."""
    config = RunConfig()
    sizes = ModelConfig()
    data = {"vocabulary": "v", "manifest_sha256": "m", "store": "s"}
    run, model = (dataclasses.asdict(c) for c in (config, sizes))
    manifest = {"configs": {"run": run, "model": model}, "data": data}
    del run["segmenter"], model["text_normalisation"]
    check_same_run(manifest, config, sizes, data, "x")
    with pytest.raises(UsageError, match="made with segmenter = characters, this run has jieba"):
        check_same_run(manifest, dataclasses.replace(config, segmenter="jieba"), sizes, data, "x")
    with pytest.raises(UsageError, match="text_normalisation none against chinese"):
        check_same_run(
            manifest, config, dataclasses.replace(sizes, text_normalisation="chinese"), data, "x"
        )


def test_fitted_settings_come_from_a_manifest_that_can_be_read(undisturbed, tmp_path):
    """Check that a damaged newest manifest is skipped; verification sets it aside later."""
    save = shutil.copytree(undisturbed, tmp_path / "damaged")
    newest, before = complete_checkpoints(save)[:2]
    (newest / "manifest.json").write_text("{")
    path, settings = newest_settings(RunConfig(save=str(save)))
    assert path == str(before)
    assert settings["data_partitions"] == read_manifest(before)["configs"]["run"]["data_partitions"]


def test_another_precision_of_products_or_scale_of_rates_is_said(store, tmp_path):
    flags = ("--data-path", store, "--save", tmp_path, *FLAGS, "--bf16", "--zero-stage", "1")
    code, out, err = launch(*pretrain(*flags, "--train-iters", "2"))
    assert code == 0, out + err
    assert "->" not in out

    changed = ("--train-iters", "4", "--fp8", "--pretrained-lr-scale", "0.5")
    code, out, err = launch(*pretrain(*flags, *changed))
    assert code == 0, out + err
    assert "fp8 False -> True" in out
    assert "pretrained_lr_scale 1.0 -> 0.5" in out
