"""tools/benchmark.py train: every contender trains on the same samples, and the figures fit together."""

import json
import math
import sys
from xml.etree import ElementTree

import torch

from megatron_interbert.model.presets import load_model_config
from tests.launching import launch
from tools.benchmarks.batches import IGNORED, pad, random_examples
from tools.benchmarks.train import shrunk

COMMAND = (sys.executable, "tools/benchmark.py", "train", "--model", "tiny", "--batch", 4, "--rounds", 2, "--steps", 1)


def test_contenders_side_by_side(tmp_path):
    code, out, err = launch(*COMMAND, "--output", tmp_path / "figures.json", "--plot", tmp_path / "bars.svg")
    assert code == 0, out + err
    result = json.loads((tmp_path / "figures.json").read_text())
    contenders = result["contenders"]
    assert list(contenders) == ["ours", "ours by plain twins", "padded InterBERT", "LXMERT", "VisualBERT"]
    for name, figures in contenders.items():
        assert name in out
        low, high = figures["time_of_ours_range"]
        assert 0 < low <= figures["time_of_ours"] <= high
        assert math.isfinite(figures["samples_per_second"])
        assert figures["tokens"] == contenders["ours"]["tokens"]
        assert abs(figures["parameters"] / contenders["ours"]["parameters"] - 1) < 0.25, name
        assert set(figures["parts"]) == {"data", "forward", "backward", "optimizer"}
    assert abs(contenders["padded InterBERT"]["parameters"] / contenders["ours"]["parameters"] - 1) < 0.01
    assert contenders["ours"]["time_of_ours"] == 1
    counted = {name: figures["flops"] for name, figures in contenders.items()}
    needed = contenders["ours"]["tflops_on_real_tokens"] / contenders["ours"]["tflops"] * counted["ours"]
    assert abs(counted["ours"] / needed - 1) < 0.05, "products as torch counts them, and by our formula"
    assert counted["padded InterBERT"] > 1.5 * counted["ours"]
    picture = ElementTree.parse(tmp_path / "bars.svg").getroot()
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in contenders] == list(contenders)
    for figures in contenders.values():
        figures["time_of_ours"] *= 1000
    (tmp_path / "recorded.json").write_text(json.dumps(result))
    code, _, err = launch(*COMMAND, "--only", "ours,LXMERT", "--compare", tmp_path / "recorded.json")
    assert code == 1
    assert "recorded.json says: ours takes 1.00 of our time instead of 1000.00; LXMERT takes" in err
    result["arguments"]["batch"] = "8"
    (tmp_path / "recorded.json").write_text(json.dumps(result))
    code, _, err = launch(*COMMAND, "--compare", tmp_path / "recorded.json")
    assert code == 2
    assert err.strip().endswith("recorded.json: measured with --batch 8, now it is 4")
    (tmp_path / "recorded.json").write_text("{}")
    code, _, err = launch(*COMMAND, "--compare", tmp_path / "recorded.json")
    assert code == 2
    assert err.strip().endswith("recorded.json: not written by `tools/benchmark.py train --output`")


def test_an_unknown_contender_is_refused():
    code, _, err = launch(*COMMAND, "--only", "ours,theirs")
    assert code == 2
    assert err.strip() == (
        "error: --only theirs: no such contender; there are ours, ours by plain twins, padded InterBERT, LXMERT, VisualBERT"
    )


def test_the_guard_names_contenders_that_have_come_nearer():
    recorded = {"contenders": {"ours": {"time_of_ours": 1.0}, "LXMERT": {"time_of_ours": 1.5}, "VisualBERT": {"time_of_ours": 2.8}}}
    now = {"contenders": {"ours": {"time_of_ours": 1.0}, "LXMERT": {"time_of_ours": 1.1}, "VisualBERT": {"time_of_ours": 2.3}}}
    assert shrunk(now, recorded, 0.2) == ["LXMERT takes 1.10 of our time instead of 1.50"]
    assert shrunk(now, recorded, 0.3) == []
    assert shrunk({"contenders": {"another": {"time_of_ours": 0.1}}}, recorded, 0.2) == []


def test_padding_keeps_every_sample():
    sizes = load_model_config("base")
    examples = random_examples(sizes, 3, words=(5, 9), regions=(2, 6), seed=1)
    batch = pad(examples, tokens=12, regions=7)
    for row, example in enumerate(examples):
        words, regions = len(example.token_ids), len(example.features)
        assert batch.token_mask[row].sum() == words
        assert batch.region_mask[row].sum() == regions
        targets = batch.word_labels[row] != IGNORED
        assert targets.nonzero()[:, 0].tolist() == example.msm_positions.tolist()
        assert batch.word_labels[row][targets].tolist() == example.token_ids[example.msm_positions].tolist()
        hidden = batch.region_labels[row] != IGNORED
        assert hidden[:regions].tolist() == example.hidden_regions.tolist()
        assert torch.equal(batch.features[row][hidden], torch.zeros(int(hidden.sum()), sizes.feature_dim))
        assert batch.features[row, :regions][~hidden[:regions]].abs().sum() > 0
