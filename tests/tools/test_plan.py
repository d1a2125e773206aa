"""Test tools/plan.py: layouts that fit, as a table and as JSON; tests/planning/test_memory.py tests
the arithmetic itself.
"""

import json
import sys

import pytest

from megatron_interbert.command_line import read_options
from megatron_interbert.commands import plan
from megatron_interbert.errors import UsageError
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
    assert len(out.strip().splitlines()) == 3 + len(layouts)
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


def test_a_given_micro_batch_must_fit():
    code, out, _ = launch(*COMMAND, "--gpus", 1, "--gpu-memory", 16, "--micro-batch-size", 1200)
    assert code == 0
    assert [line.split()[3] for line in out.splitlines()[3:]] == ["yes"], "only with recomputation"


def test_what_cannot_be_is_one_line(monkeypatch):
    for flags, line in (
        (
            ("--gpu-memory", 0.3),
            "nothing fits 8 devices of 0.3 GiB; try more of them or a smaller model",
        ),
        (("--micro-batch-size", -4), "--micro-batch-size is -4, expected more than 0"),
        (("--gpu-memory", "nan"), "--gpu-memory nan: expected a finite number"),
        (("--gpu-memory", "inf"), "--gpu-memory inf: expected a finite number"),
        (("--gpu-memory", -1), "--gpu-memory is -1.0, expected more than 0"),
        (("--gpus", "many"), "argument --gpus: invalid int value: 'many'"),
        (("--output", "."), "--output .: is a folder, expected a file to write"),
        (
            ("--micro-batch-size", 10**6),
            "nothing fits 8 devices of 80 GiB; try more of them or fewer samples at a time",
        ),
        (("--global-batch-size", -3), "--global-batch-size is -3, expected 0 or more"),
        (("--gpus", 0), "--gpus is 0, expected more than 0"),
        (
            ("--model", "sample"),
            "--model sample takes sizes from its data; give base, or a JSON file with all sizes",
        ),
    ):
        assert refused(monkeypatch, *flags) == line

    code, out, err = launch(*COMMAND, *flags)
    assert (code, out, err.strip()) == (2, "", f"error: {line}")


def test_spans_go_from_small_to_large(monkeypatch):
    for text in ("20-8", "0", "0-0", "-3", "many", "8-20-30", "nan"):
        expected = "expected a number above 0, or two from small to large, such as 10-100"
        assert refused(monkeypatch, f"--words={text}") == f"argument --words: '{text}', {expected}"


def test_any_number_of_devices_is_answered():
    code, out, err = launch(*COMMAND, "--gpus", 10**15, "--micro-batch-size", 1)
    assert code == 0, err
    assert {line.split()[1] for line in out.splitlines()[3:]} == {"1", "2", "4"}


def test_speed_by_device(monkeypatch, capsys, tmp_path):
    """Check that layouts are sorted by samples/s, that the links decide what is fastest, and that
    the assumptions are printed.
    """
    output = tmp_path / "plan.json"
    flags = ("--model", "m6-10b-dense", "--gpus", 64, "--device", "a100-40")
    flags = (*flags, "--global-batch-size", 2048, "--output", output)
    run_here(monkeypatch, *flags)
    told = capsys.readouterr().out
    assert "products at 0.45 of 312 TFLOP/s; 230 GB/s between 8 devices of a node" in told
    assert "36 of 40 used at most" in told

    slow = json.loads(output.read_text())["layouts"]
    rates = [row["samples_per_second"] for row in slow]
    assert rates == sorted(rates, reverse=True)
    for row in slow:
        assert row["samples_per_second"] == pytest.approx(2048 / sum(row["seconds"].values()))

    # the network no slower than NVLink, and hidden: then splitting layers only costs
    output.unlink()
    run_here(monkeypatch, *flags, "--network-bandwidth", 1000, "--overlap", 1)
    fast = json.loads(output.read_text())["layouts"]
    assert fast[0]["tensor"] == 1 < slow[0]["tensor"]
    assert fast[0]["samples_per_second"] > slow[0]["samples_per_second"]
