"""Test tools/plan.py: layouts that fit, as a table and as JSON; tests/planning/test_memory.py tests
the arithmetic itself.
"""

import dataclasses
import json
import re
import sys

import pytest

from megatron_interbert.command_line import parse, read_options
from megatron_interbert.commands import plan
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.dry_run import DryRunConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.tasks.parts import sizes_of_model
from megatron_interbert.training.deepspeed_config import merge
from megatron_interbert.training.micro_batch import layout_of
from tests.launching import launch

COMMAND = (sys.executable, "tools/plan.py")


def refused(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, flags)])
    with pytest.raises(UsageError) as caught:
        plan.run(read_options(plan.Options))
    return str(caught.value)


def run_here(monkeypatch, *flags):
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, flags)])
    plan.run(read_options(plan.Options))


def test_a_table_of_layouts_that_fit(tmp_path):
    code, out, err = launch(
        *COMMAND,
        "--gpus",
        4,
        "--gpu-memory",
        16,
        "--global-batch-size",
        4096,
        "--output",
        tmp_path / "p.json",
    )
    assert code == 0, err
    layouts = json.loads((tmp_path / "p.json").read_text())["layouts"]
    fit, left_out = out.split("left out:") if "left out:" in out else (out, "")
    assert len(fit.split("\nDP  TP  ")[1].strip().splitlines()) == 1 + len(layouts)
    assert "157.1 M parameters on 4 devices of 16 GiB, of which 14.4 are used at most" in fit
    assert "fewest devices, of 1, 2, 4, .., for 1 sample at a time: 1 (DP1 x TP1, ZeRO-1)" in fit
    for line in fit.splitlines():
        assert len(line) <= 110
        if heading := re.match(r"  (\S+)   *\S", line):  # a line of the legend
            assert heading[1] in fit.split("\nDP  ")[1].splitlines()[0] or heading[1] == "DP"
    assert not left_out
    assert {(row["data"], row["tensor"]) for row in layouts} == {(4, 1), (2, 2), (1, 4)}
    for row in layouts:
        assert 0 < row["peak"] <= 0.9 * 16 * 2**30
        assert row["micro_batch_size"] <= 4096 // row["data"]

    kept = {
        row["recompute"]: row["micro_batch_size"]
        for row in layouts
        if (row["tensor"], row["zero_stage"]) == (1, 1)
    }
    assert kept[True] >= kept[False]


def test_weights_and_optimizer_are_bytes_of_the_parameters(tmp_path):
    """Count the paper's 157.0 M parameters layer by layer; check ZeRO's shares of them."""
    flags = ("--model", "base", "--gpus", 4, "--gpu-memory", 80, "--output", tmp_path / "p.json")
    code, _, err = launch(*COMMAND, *flags)
    assert code == 0, err
    hidden, inner, words, positions = 768, 3072, 30592, 512
    layer = 4 * hidden * hidden + 4 * hidden + 2 * hidden * inner + inner + hidden + 4 * hidden
    embeddings = (words + positions + 2) * hidden + 2 * hidden
    image = 2048 * hidden + hidden + 5 * hidden + hidden + 2 * hidden
    heads = (hidden * hidden + 3 * hidden + words) + (hidden * hidden + 3 * hidden)
    heads += 1601 * hidden + 1601 + 2 * (hidden * 1024 + 1024) + 2 * 1024 + 2
    parameters = 18 * layer + embeddings + image + heads
    rows = json.loads((tmp_path / "p.json").read_text())["layouts"]
    found = {row["zero_stage"]: row for row in rows if row["tensor"] == 1 and not row["recompute"]}
    assert found[1]["weights"] == pytest.approx(2 * parameters, rel=0.01)
    assert found[3]["weights"] < found[1]["weights"]
    for stage in (1, 2, 3):  # fp32 weights and two moments, a quarter of them on each rank
        assert found[stage]["optimizer"] == pytest.approx(12 * parameters / 4, rel=0.01)


def test_a_given_micro_batch_must_fit(monkeypatch, capsys, tmp_path):
    """Check that what does not fit is left out with its reason: here all but recomputation."""
    output = tmp_path / "p.json"
    flags = ("--gpus", 1, "--gpu-memory", 16, "--micro-batch-size", 1200, "--output", output)
    run_here(monkeypatch, *flags)
    assert [row["recompute"] for row in json.loads(output.read_text())["layouts"]] == [True]

    _, left_out = capsys.readouterr().out.split("left out:")
    [line] = left_out.strip().splitlines()[1:]
    assert re.search(r"1200 samples take \d+\.\d GiB \(activations \d+\.\d\) of 14\.4 GiB$", line)


def test_offload_is_planned_if_there_is_room(monkeypatch, capsys, tmp_path):
    """Plan 10 B on one device: nothing fits, the host's memory is too small, its disk is not."""
    output = tmp_path / "p.json"
    flags = ("--model", "m6-10b-dense", "--gpus", 1, "--device", "h100", "--output", output)
    with pytest.raises(UsageError, match=r"try 4 devices \(DP4 x TP1, ZeRO-2\), a smaller"):
        run_here(monkeypatch, *flags)

    run_here(monkeypatch, *flags, "--host-memory", 64, "--nvme-space", 1000)
    layouts = json.loads(output.read_text())["layouts"]
    assert {row["optimizer_on"] for row in layouts} == {"nvme"}
    for row in layouts:
        assert row["host"] <= 64 * 2**30
        # weight, moments and gradient of the update in fp32
        assert row["disk"] >= 16 * 10.2e9

    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"a rank needs \d+\.\d GiB of host memory of 64\.0 GiB", out)
    assert "50 GB/s to the host, updates there at 40 GB/s, 3 to its disk" in out


def test_the_best_layout_as_files_that_a_run_takes(monkeypatch, capsys, tmp_path):
    """Search on devices that are too small for the optimizer, and rehearse what is written."""
    flags = ("--gpus", 4, "--device", "a100-40", "--gpu-memory", 1.2, "--host-memory", 16)
    flags = (*flags, "--global-batch-size", 64, "--search", tmp_path / "recipe")
    run_here(monkeypatch, *flags)
    start, rehearsal = capsys.readouterr().out.splitlines()[-2:]
    run = f"--config {tmp_path}/recipe/run.yaml --data-path DATA"
    run += " --save RUN --train-iters STEPS"
    assert start == f"start: interbert launch --processes 4 pretrain {run}"
    words = rehearsal.removeprefix("rehearse: interbert dry-run ").split()
    parse(DryRunConfig, "", words).check()

    (tmp_path / "recipe").rename(tmp_path / "moved")
    config = parse(RunConfig, "", ["--config", str(tmp_path / "moved" / "run.yaml")])
    config.check()
    data = 4 // config.tensor_model_parallel_size
    settings = merge(config, data)
    assert config.global_batch_size == 64
    assert config.bf16
    assert settings["gradient_accumulation_steps"] == 64 // data // config.micro_batch_size
    found = layout_of(config, data, Kernels())
    rows = json.loads(json.dumps(dataclasses.asdict(found)))
    run_here(monkeypatch, *flags, "--output", tmp_path / "p.json")
    best = json.loads((tmp_path / "p.json").read_text())["layouts"][0]
    assert rows | {"fused": True} == {name: best[name] for name in rows}


def test_the_launcher_of_10_b_has_the_best_layout(monkeypatch, tmp_path):
    """Compare the flags of launchers/pretrain_10b.sbatch with the planner's first row, and check
    that the file hands them on as Slurm would.
    """
    flags = ("--model", "m6-10b-dense", "--gpus", 512, "--device", "h100")
    flags = (*flags, "--global-batch-size", 8192, "--output", tmp_path / "p.json")
    run_here(monkeypatch, *flags)
    best = json.loads((tmp_path / "p.json").read_text())["layouts"][0]

    code, _, err = launch("bash", "launchers/pretrain_10b.sbatch", "--data-path", "DATA")
    assert code == 2
    words = err.split("megatron_interbert.pretrain ")[1].split()
    config = parse(RunConfig, "", words)
    config.check()
    assert config.model == "m6-10b-dense"
    assert config.data_path == "DATA"
    assert config.global_batch_size == 8192
    assert config.micro_batch_size == best["micro_batch_size"]
    layout = layout_of(config, 512 // config.tensor_model_parallel_size, Kernels())
    names = ("data", "tensor", "zero_stage", "half", "recompute", "sequence_parallel")
    assert {name: best[name] for name in names} == {name: getattr(layout, name) for name in names}


def test_experts_by_flags(tmp_path, monkeypatch, capsys):
    """Check that the layout found has the experts, and that a run takes it with them."""
    flags = ("--model", "tiny", "--gpus", 4, "--device", "h100", "--micro-batch-size", 64)
    run_here(monkeypatch, *flags)
    dense = capsys.readouterr().out
    flags = (*flags, "--experts", 8, "--prototypes", 2)
    run_here(monkeypatch, *flags, "--search", tmp_path / "found")
    found = capsys.readouterr().out
    assert found.split(" parameters on")[0] != dense.split(" parameters on")[0]

    config = parse(RunConfig, "", ["--config", str(tmp_path / "found" / "run.yaml")])
    sizes = sizes_of_model(config)
    assert (sizes.experts, sizes.prototypes, sizes.share_layers) == (8, 2, False)
    assert refused(monkeypatch, "--prototypes", 2).startswith("--experts, --prototypes: model: pro")


def test_the_advice_for_more_devices_fits(monkeypatch, capsys):
    """Follow the advice of a refusal, where gradients of several micro-batches need more memory
    than one does.
    """
    flags = ("--gpu-memory", 5.2, "--global-batch-size", 4096, "--micro-batch-size", 1024)
    advice = refused(monkeypatch, "--gpus", 1, *flags)
    devices = re.search(r"try (\d+) devices? \(", advice)[1]
    assert int(devices) > 1

    run_here(monkeypatch, "--gpus", devices, *flags)
    out = capsys.readouterr().out
    assert f"fewest devices, of 1, 2, 4, .., for 1024 samples at a time: {devices} (" in out


def test_a_small_model_and_nodes_that_are_not_full(monkeypatch, capsys):
    flags = ("--model", "tiny", "--gpus", 12, "--micro-batch-size", 1, "--device", "h100")
    run_here(monkeypatch, *flags)
    out = " ".join(capsys.readouterr().out.split())
    assert "ZeRO recompute micro-batch weights optimizer gradients buffers activations peak" in out
    assert "note: 12 devices do not fill nodes of 8 (--gpus-per-node)" in out
    assert "as many as fit" not in out


def test_what_does_not_divide_is_said(monkeypatch, capsys):
    run_here(monkeypatch, "--gpus", 15)
    out = capsys.readouterr().out
    assert "TP 5: --tensor-model-parallel-size 5 does not divide num_attention_heads 12" in out
    run_here(monkeypatch, "--gpus", 8, "--global-batch-size", 4)
    out = capsys.readouterr().out
    assert "a global batch of 4 is not a multiple of 8 data-parallel ranks" in out


def test_what_cannot_be_is_one_line(monkeypatch):
    for flags, line in (
        (
            ("--gpu-memory", 0.3),
            "nothing fits 8 devices of 0.3 GiB; try 32 devices (DP8 x TP4, ZeRO-2), a smaller"
            " model, or offload (--host-memory)",
        ),
        (("--micro-batch-size", -4), "--micro-batch-size is -4, expected more than 0"),
        (("--gpu-memory", "nan"), "--gpu-memory nan: expected a finite number"),
        (("--gpu-memory", "inf"), "--gpu-memory inf: expected a finite number"),
        (("--gpu-memory", -1), "--gpu-memory is -1.0, expected more than 0"),
        (("--gpus", "many"), "--gpus: 'many', expected a whole number"),
        (("--output", "."), "--output .: is a folder, expected a file to write"),
        (
            ("--micro-batch-size", 10**6),
            "nothing fits 8 devices of 80 GiB; try more of them, fewer samples at a time,"
            " or offload (--host-memory)",
        ),
        (
            ("--global-batch-size", 12, "--micro-batch-size", 7),
            "no layout of 8 devices can share the batch: a global batch of 12 is not a multiple of"
            " 8 data-parallel ranks",
        ),
        (
            ("--search", f"{__file__}/folder", "--device", "h100"),
            f"--search {__file__}/folder: nothing can be written there (Not a directory); choose"
            " another folder",
        ),
        (("--search", "recipe"), "--search needs --device, by whose speed it chooses"),
        (("--global-batch-size", -3), "--global-batch-size is -3, expected 0 or more"),
        (("--gpus", 0), "--gpus is 0, expected more than 0"),
        (("--words", "8-513"), "--words up to 513: the model has 512 positions"),
        (("--efficiency", 2), "--efficiency is 2.0, expected more than 0, 1 at most"),
        (
            ("--gpu-memory", 0.2, "--host-memory", 1),
            "nothing fits 8 devices of 0.2 GiB; try 512 devices (DP128 x TP4, ZeRO-2, activations"
            " recomputed), a smaller model, more --host-memory, or offload to a disk"
            " (--nvme-space)",
        ),
        (
            ("--model", "none"),
            "--model none: no such preset or file; presets: tiny, sample, base, sample-chinese,"
            " base-chinese, large, m6-10b-dense, m6-1.4b, m6-10b, m6-100b, m6-1t",
        ),
    ):
        assert refused(monkeypatch, *flags) == line

    code, out, err = launch(*COMMAND, *flags)
    assert (code, out, err.strip()) == (2, "", f"error: {line}")


def test_spans_go_from_small_to_large(monkeypatch):
    for text in ("20-8", "0", "0-0", "-3", "many", "8-20-30", "8-", "nan"):
        expected = "expected a number above 0, or two from small to large, such as 10-100"
        assert refused(monkeypatch, f"--words={text}") == f"--words: '{text}', {expected}"


def test_any_number_of_devices_is_answered():
    code, out, err = launch(*COMMAND, "--gpus", 10**15, "--micro-batch-size", 1)
    assert code == 0, err
    fit = out.split("\nTP ")[0]
    rows = fit.split("\nDP  ")[1].splitlines()[1:]
    assert {line.split()[1] for line in rows} == {"1", "2", "4"}


def test_speed_by_device(monkeypatch, capsys, tmp_path):
    """Check that layouts are sorted by samples/s, that the links decide what is fastest, and that
    the assumptions are printed.
    """
    output = tmp_path / "plan.json"
    flags = ("--model", "m6-10b-dense", "--gpus", 64, "--device", "a100-40")
    flags = (*flags, "--global-batch-size", 2048, "--output", output)
    run_here(monkeypatch, *flags)
    told = " ".join(capsys.readouterr().out.split())
    assert "products at 0.45 of 312 TFLOP/s; 230 GB/s between 8 devices of a node" in told
    assert "64 devices of 40 GiB, of which 36 are used at most" in told

    slow = json.loads(output.read_text())["layouts"]
    rates = [row["samples_per_second"] for row in slow]
    assert rates == sorted(rates, reverse=True)
    for row in slow:
        assert row["samples_per_second"] == pytest.approx(2048 / sum(row["seconds"].values()))

    # the network no slower than NVLink, and hidden: then splitting layers pays less
    output.unlink()
    run_here(monkeypatch, *flags, "--network-bandwidth", 1000, "--overlap", 1)
    fast = json.loads(output.read_text())["layouts"]
    assert fast[0]["tensor"] < slow[0]["tensor"]
    assert fast[0]["samples_per_second"] > slow[0]["samples_per_second"]
