"""Test the comparison of experts as one command, with few steps."""

import json
import sys

from megatron_interbert.command_line import read_options
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.model.presets import PRESETS, load_model_config
from megatron_interbert.weights.sources import open_weights
from tests.corpus import write_store
from tests.launching import launch
from tools.studies.compare_experts import variants
from tools.studies.options import Options
from tools.studies.variant_run import Run


def test_experts_from_runs_to_table(tmp_path):
    store = write_store(tmp_path / "s", images=70)
    output = tmp_path / "out"
    code, out, err = launch(
        *(sys.executable, "tools/compare_experts.py", "--data-path", store),
        *("--test-data-path", store, "--output", output, "--model", "tiny", "--seeds", 5),
        *("--train-iters", 2, "--finetune-iters", 1, "--batch-size", 64, "--jobs", 2),
        *("--only", "pseudo-to-real"),
    )
    assert code == 0, out + err
    found = json.loads((output / "experts.json").read_text())["results"]
    assert found.keys() == {"pseudo-to-real"}
    table = (output / "experts.md").read_text()
    assert "| variant | pretraining loss | largest load | zero-shot t2i R@1 |" in table
    assert "| the same, layers shared in the first half |" in table
    figures = found["pseudo-to-real"][0]["pretraining"]
    assert 1 < figures["loss"] < 20
    assert 1 <= figures["largest_load"] <= 8

    folder = output / "pseudo-to-real" / "seed-5"
    assert open_weights(folder / "first").config.share_layers
    untied = open_weights(folder / "pretrained").config
    assert (untied.experts, untied.share_layers) == (8, False)


def test_all_variants_do_the_same_work_for_each_token(tmp_path, monkeypatch):
    dense = PRESETS["sample"]
    options = Options(model="sample", output=str(tmp_path))

    for name, variant in variants(dense).items():
        run = Run(name, variant, 1, options)
        sizes = load_model_config(run._model())
        monkeypatch.setattr("sys.argv", ["pretrain", *variant.flags, "--micro-batch-size", "64"])
        config = read_options(RunConfig)
        config.check_routing_groups()
        prototypes = max(config.prototypes, 1)
        assert prototypes * sizes.ffn_hidden_size == dense.ffn_hidden_size, name
        assert config.experts in (0, 8 * prototypes), name
