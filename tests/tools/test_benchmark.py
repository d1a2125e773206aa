"""Test tools/benchmark.py train: every contender trains on the same samples, and the figures are
consistent.
"""

import json
import math
import sys
from xml.etree import ElementTree

import pytest
import torch

from megatron_interbert.model.presets import load_model_config
from megatron_interbert.virtual.samples import random_examples
from tests.launching import launch
from tools.benchmarks.batches import IGNORED, answers_of, pad, questions, sizes_of
from tools.benchmarks.train import shrunk

COMMAND = (
    sys.executable,
    "tools/benchmark.py",
    "train",
    "--model",
    "tiny",
    "--batch",
    4,
    "--rounds",
    2,
    "--steps",
    1,
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measure all contenders; return (output, folder of figures.json and bars.svg)."""
    folder = tmp_path_factory.mktemp("measured")
    code, out, err = launch(
        *COMMAND, "--output", folder / "figures.json", "--plot", folder / "bars.svg"
    )
    assert code == 0, out + err

    return out, folder


def test_contenders_side_by_side(measured, tmp_path):
    out, folder = measured
    result = json.loads((folder / "figures.json").read_text())
    contenders = result["contenders"]
    assert list(contenders) == [
        "ours",
        "ours by plain twins",
        "padded InterBERT",
        "LXMERT",
        "VisualBERT",
    ]

    for name, figures in contenders.items():
        assert name in out
        low, high = figures["time_of_ours_range"]
        assert 0 < low <= figures["time_of_ours"] <= high
        assert math.isfinite(figures["samples_per_second"])
        assert figures["tokens"] == contenders["ours"]["tokens"]
        assert abs(figures["parameters"] / contenders["ours"]["parameters"] - 1) < 0.25, name
        assert set(figures["parts"]) == {"data", "forward", "backward", "optimizer"}
        assert set(figures["products"]) == {"forward", "backward"}
        assert all(0 < seconds < math.inf for seconds in figures["products"].values())

    assert (
        abs(contenders["padded InterBERT"]["parameters"] / contenders["ours"]["parameters"] - 1)
        < 0.01
    )
    assert contenders["ours"]["time_of_ours"] == 1
    counted = {name: figures["flops"] for name, figures in contenders.items()}
    needed = (
        contenders["ours"]["tflops_on_real_tokens"] / contenders["ours"]["tflops"] * counted["ours"]
    )
    assert abs(counted["ours"] / needed - 1) < 0.05, (
        "products as torch counts them, and by our formula"
    )
    assert counted["padded InterBERT"] > 1.5 * counted["ours"]
    picture = ElementTree.parse(folder / "bars.svg").getroot()
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in contenders] == list(contenders)
    code, out, err = launch(
        *COMMAND, "--only", "ours,LXMERT", "--compare", folder / "figures.json", "--tolerance", 0.99
    )
    assert code == 0, out + err
    assert "no lead has shrunk by more than 99%" in out
    for figures in contenders.values():
        figures["time_of_ours"] *= 1000

    (tmp_path / "recorded.json").write_text(json.dumps(result))
    code, _, err = launch(
        *COMMAND, "--only", "ours,LXMERT", "--compare", tmp_path / "recorded.json"
    )
    assert code == 1
    assert "recorded.json: ours took 1000.00 of our time and now takes 1.00; LXMERT took" in err
    result["arguments"]["batch"] = "8"
    (tmp_path / "recorded.json").write_text(json.dumps(result))
    code, _, err = launch(*COMMAND, "--compare", tmp_path / "recorded.json")
    assert code == 2
    assert err.strip().endswith("recorded.json: measured with --batch 8, now it is 4")


def test_answers_to_questions_side_by_side(tmp_path):
    output = tmp_path / "vqa.json"
    code, out, err = launch(*COMMAND, "--task", "vqa", "--only", "ours,LXMERT", "--output", output)
    assert code == 0, out + err
    figures = json.loads(output.read_text())["contenders"]
    assert list(figures) == ["ours", "LXMERT"]
    assert abs(figures["LXMERT"]["parameters"] / figures["ours"]["parameters"] - 1) < 0.25
    assert figures["LXMERT"]["tokens"] == figures["ours"]["tokens"]

    examples = questions(random_examples(sizes_of("tiny"), 5))
    assert not any(example.hidden_regions.any() or example.mismatched for example in examples)
    padded = pad(examples, 40, 36)
    assert padded.answers.argmax(dim=1).tolist() == answers_of(examples).tolist()
    assert (padded.word_labels == IGNORED).all()


def test_ranks_together_and_apart(measured, tmp_path):
    command = (
        *COMMAND,
        "--ranks",
        2,
        "--only",
        "ours,LXMERT",
        "--output",
        tmp_path / "two.json",
        "--plot",
        tmp_path / "bars.svg",
    )
    code, out, err = launch(*command)
    assert code == 0, out + err
    two = json.loads((tmp_path / "two.json").read_text())
    one = json.loads((measured[1] / "figures.json").read_text())
    assert "on each of 2 ranks" in (tmp_path / "bars.svg").read_text()

    for name, figures in two["contenders"].items():
        assert list(figures["parts"])[-1] == "communication"
        assert math.isfinite(figures["parts"]["communication"])
        single = one["contenders"][name]
        assert "communication" not in single["parts"]
        assert (figures["tokens"], figures["parameters"]) == (
            2 * single["tokens"],
            single["parameters"],
        )
        assert figures["flops"] == 2 * single["flops"], (
            "each rank does the work of a batch of its own"
        )

    code, _, err = launch(*COMMAND, "--compare", tmp_path / "two.json")
    assert code == 2
    assert err.strip().endswith("two.json: measured with --ranks 2, now it is 1")


def test_wrong_use_is_one_line(tmp_path):
    known = "ours, ours by plain twins, padded InterBERT, LXMERT, VisualBERT"
    (tmp_path / "recorded.json").write_text("{}")

    for flags, line in (
        (("--only", "ours,theirs"), f"--only theirs: no such contender; choose from {known}"),
        (("--only", "LXMERT"), "--only needs one of ours, with which the others are compared"),
        (("--rounds", 0), "--rounds is 0, expected 1 or more"),
        (("--batch", 0), "--batch is 0, expected 1 or more"),
        (("--ranks", 0), "--ranks is 0, expected 1 or more"),
        (("--tolerance", 5), "--tolerance is 5.0, expected a share from 0 up to 1, such as 0.2"),
        (("--bf16", "--zero-stage", 0), "--bf16 needs --zero-stage 1 or higher"),
        (("--plot", "/proc/nowhere/x.svg"), "--plot /proc/nowhere: nothing can be written there"),
        (
            ("--compare", tmp_path / "recorded.json"),
            "not written by `tools/benchmark.py train --output`",
        ),
    ):
        code, out, err = launch(*COMMAND, *flags)
        assert (code, out) == (2, "")
        assert line in err.strip().splitlines()[-1]


def test_a_contender_that_cannot_begin_ends_the_benchmark(tmp_path):
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "image_attention_heads": 2,
        "max_position_embeddings": 4,
    }
    (tmp_path / "model.json").write_text(json.dumps(sizes))
    command = (
        sys.executable,
        "tools/benchmark.py",
        "train",
        "--model",
        tmp_path / "model.json",
        "--batch",
        2,
        "--only",
        "ours",
    )
    code, _, err = launch(*command, timeout=120)
    assert code == 1
    assert (
        "ours ended before it was measured; see its message above" in err.strip().splitlines()[-1]
    )


def test_the_guard_names_contenders_that_have_come_nearer():
    def figures(times):
        return {
            "contenders": {
                name: {"time_of_ours": t, "time_of_ours_range": [t - 0.1, t + 0.1]}
                for name, t in times.items()
            }
        }

    recorded = figures({"ours": 1.0, "LXMERT": 1.5, "VisualBERT": 2.8})
    now = figures({"ours": 1.0, "LXMERT": 1.09, "VisualBERT": 2.3})
    assert shrunk(now, recorded, 0.2) == ["LXMERT took 1.50 of our time and now takes 1.09"]
    now["contenders"]["LXMERT"]["time_of_ours_range"][1] = 1.4
    assert shrunk(now, recorded, 0.2) == [], "one round was as before"


def test_padding_keeps_every_sample():
    sizes = load_model_config("base")
    examples = random_examples(sizes, 3, words=(5, 9), regions=(2, 6), seed=1)
    batch = pad(examples, tokens=12, regions=7)

    for row, example in enumerate(examples):
        words = len(example.token_ids)
        regions = len(example.features)
        assert batch.token_mask[row].sum() == words
        assert batch.region_mask[row].sum() == regions
        targets = batch.word_labels[row] != IGNORED
        assert targets.nonzero()[:, 0].tolist() == example.msm_positions.tolist()
        assert (
            batch.word_labels[row][targets].tolist()
            == example.token_ids[example.msm_positions].tolist()
        )
        hidden = batch.region_labels[row] != IGNORED
        assert hidden[:regions].tolist() == example.hidden_regions.tolist()
        assert torch.equal(
            batch.features[row][hidden], torch.zeros(int(hidden.sum()), sizes.feature_dim)
        )
        assert batch.features[row, :regions][~hidden[:regions]].abs().sum() > 0


def test_experts_against_a_dense_layer(tmp_path):
    output = tmp_path / "experts.json"
    flags = ("--model", "tiny", "--samples", 2, "--rounds", 1, "--output", output)
    code, out, err = launch(sys.executable, "tools/benchmark.py", "experts", *flags)
    assert code == 0, err
    assert "8 experts" in out
    assert list(json.loads(output.read_text())["ratios"]) == [
        "dense",
        "experts without routing",
        "8 experts",
    ]


def test_predicted_against_measured_layouts(tmp_path):
    """Check that two ranks measure every layout, and that the parts of a prediction add up."""
    output = tmp_path / "layouts.json"
    flags = ("--model", "tiny", "--ranks", 2, "--batch", 4, "--steps", 1, "--output", output)
    code, out, err = launch(sys.executable, "tools/benchmark.py", "layouts", *flags)
    assert code == 0, out + err
    layouts = json.loads(output.read_text())["layouts"]
    assert list(layouts) == [
        *(f"DP2 TP1 ZeRO-{stage}" for stage in range(4)),
        "DP1 TP2 ZeRO-0",
        "DP1 TP2 split rows ZeRO-0",
    ]

    for name, one in layouts.items():
        assert name in out
        assert 0 < one["measured"] < math.inf
        assert one["predicted"] == pytest.approx(sum(one["parts"].values()))
        assert (one["parts"]["tensor"] > 0) == ("TP2" in name)
        assert (one["parts"]["data"] > 0) == ("DP2" in name)


def test_saves_and_conversions(tmp_path):
    """Check that every row of the table is measured, and what does not depend on the machine."""
    output = tmp_path / "figures.json"
    flags = ("--model", "tiny", "--batch", 2, "--bf16", "--repeats", 1, "--output", output)
    code, out, err = launch(
        sys.executable, "tools/benchmark.py", "checkpoint", *flags, "--folder", tmp_path
    )
    assert code == 0, out + err

    measured = json.loads(output.read_text())
    seconds, speeds = measured["seconds"], measured["megabytes_per_second"]
    always = {"step", "stall", "written", "copy", "read", "deepspeed_save"}
    assert always <= set(seconds) <= always | {"step_while_writing"}
    assert set(speeds) == {"copy", "sharded TP1", "sharded TP2", "huggingface", "official"}
    assert all(0 < figure < math.inf for figure in (*seconds.values(), *speeds.values()))
    assert all(f"{speed:.0f} MB/s" in out for speed in speeds.values())
    assert list(tmp_path.iterdir()) == [output], "the measured checkpoints are removed"
