"""Test the comparison of experts as one command, with few steps."""

import json
import sys

from megatron_interbert.weights.sources import open_weights
from tests.corpus import write_store
from tests.launching import launch


def test_experts_from_runs_to_table(tmp_path):
    store = write_store(tmp_path / "s", images=70)
    output = tmp_path / "out"
    code, out, err = launch(
        *(sys.executable, "tools/compare_experts.py", "--data-path", store),
        *("--test-data-path", store, "--output", output, "--model", "tiny", "--seeds", 5),
        *("--train-iters", 2, "--finetune-iters", 1, "--batch-size", 64, "--jobs", 2),
        *("--only", "balanced,prototypes,pseudo-to-real"),
    )
    assert code == 0, out + err
    found = json.loads((output / "experts.json").read_text())["results"]
    assert found.keys() == {"balanced", "prototypes", "pseudo-to-real"}
    assert "2 prototypes of 8 experts" in (output / "experts.md").read_text()

    sizes = open_weights(output / "prototypes" / "seed-5" / "pretrained").config
    assert (sizes.experts, sizes.prototypes, sizes.ffn_hidden_size) == (16, 2, 64)
    folder = output / "pseudo-to-real" / "seed-5"
    assert open_weights(folder / "shared").config.share_layers
    untied = open_weights(folder / "pretrained").config
    assert (untied.experts, untied.share_layers) == (8, False)
