"""Test `convert --verify` and the model card of weights with any heads."""

import dataclasses
import json
import sys

import torch

from megatron_interbert import hf
from megatron_interbert.weights.output import Output
from megatron_interbert.weights.sources import open_weights
from megatron_interbert.weights.targets import write_target
from megatron_interbert.weights.tensor_files import TensorLayout
from tests.launching import launch
from tests.sizes import FOR_EIGHT_RANKS as SIZES
from tests.tools.test_convert import random_source


def test_verify_compares_every_head_that_there_is(tmp_path):
    """Check finetuned weights, with one head or two: no word of classes that do not fit them."""
    random_source(SIZES, tmp_path / "ours")
    trained = open_weights(tmp_path / "ours")
    choice = {
        "choice_head.weight": torch.randn(1, SIZES.pooled_size),
        "choice_head.bias": torch.randn(1),
    }
    trained.layouts |= {n: TensorLayout(t.dtype, tuple(t.shape)) for n, t in choice.items()}
    read = trained.get
    trained.get = lambda name: choice[name] if name in choice else read(name)
    encoder = ("text_hidden", "image_hidden")
    cases = {
        ("itm",): (*encoder, "itm_logits"),
        ("itm", "choice"): (*encoder, "itm_logits", "choice_logit"),
        ("msm", "mrm", "itm"): (*encoder, "msm_logits", "mrm_logits", "itm_logits"),
        (): encoder,
    }

    for heads, compared in cases.items():
        source = tmp_path / f"with {' '.join(heads)}"
        layouts = {
            name: entry
            for name, entry in trained.layouts.items()
            if "_head." not in name or name.split("_head.")[0] in heads
        }
        write_target("sharded", Output(dataclasses.replace(trained, layouts=layouts)), source)
        folder = tmp_path / f"exported {' '.join(heads)}"
        code, out, err = launch(
            *(sys.executable, "tools/convert_checkpoint.py", source),
            *("--to", "huggingface", "--output", folder, "--verify"),
        )
        assert code == 0, err
        assert "REPORT" not in out + err
        assert "MISSING" not in out + err
        lines = [line for line in out.splitlines() if line.startswith("verify")]
        assert [line.split()[1].removesuffix(":") for line in lines] == [*compared]
        assert all(float(line.split()[-1]) < 1e-5 for line in lines)

        card = (folder / "README.md").read_text()
        config = json.loads((folder / "config.json").read_text())
        architecture = getattr(hf, config["architectures"][0])
        assert ("AutoModelForPreTraining" in card) == ("msm" in heads)
        assert ("InterBertScorer" in card) == ("itm" in heads)
        assert set(architecture.heads) <= set(heads)
        assert bool(architecture.heads) == bool(heads)
        padding = (SIZES.padded_vocab_size - SIZES.vocab_size) * (32 + ("msm" in heads))
        count = sum(torch.Size(entry.shape).numel() for entry in layouts.values()) - padding
        assert f"{count:,} parameters" in card
