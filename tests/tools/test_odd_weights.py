"""Test bad weights: odd configurations, indexes, facts and files are named, and NaN is reported."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.loading import load_model
from megatron_interbert.weights.output import Output
from megatron_interbert.weights.sources import open_weights, recognise
from megatron_interbert.weights.targets import write_target
from tests.tools.test_convert import SIZES, convert, random_source


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    random_source(SIZES, folder / "ours")
    write_target("huggingface", Output(open_weights(folder / "ours")), folder / "hf")
    return folder / "hf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_facts": [1]}, r"config.json: training_facts is \[1\], expected an object"),
        ({"training_facts": "a"}, r"config.json: training_facts is 'a', expected an object"),
        (
            {"training_facts": {"vocabulary": ["a"]}},
            r"vocabulary of training_facts is \['a'\], expected str",
        ),
        ({"training_facts": {"detector": 5}}, "detector of training_facts is 5, expected dict"),
        (
            {"num_attention_heads": 0},
            "config.json: model: num_attention_heads is 0, expected a whole number",
        ),
        ({"num_attention_heads": 5}, "config.json: model: hidden_size 32 is not a multiple"),
        (
            {"interaction_layers": 10**7},
            "interaction_layers is 10000000, expected a whole number from 0 to 1000",
        ),
    ],
)
def test_odd_configurations_are_one_line(exported, tmp_path, changes, message):
    folder = shutil.copytree(exported, tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(UsageError, match=message):
        open_weights(folder)


def test_only_facts_that_the_converter_writes_are_believed(exported, tmp_path):
    """Ignore `run` or `files` in a config.json: only our own checkpoints may claim those."""
    folder = shutil.copytree(exported, tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    facts = {"run": 5, "files": [1], "task": {}, "iteration": 7, "detector": None}
    (folder / "config.json").write_text(json.dumps({**values, "training_facts": facts}))
    assert open_weights(folder).facts == {"iteration": 7}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ["a"],
            r"index.json: weight_map is \['a'\], expected a mapping from tensor names to file",
        ),
        (None, "weight_map is None"),
        ({"a": 5}, "the file of a is 5, expected a name without folders"),
        (
            {"a": "../hf/model.safetensors"},
            "the file of a is '../hf/model.safetensors', expected a name without folders",
        ),
        ({"a": "/etc/passwd"}, "the file of a is '/etc/passwd', expected a name without folders"),
        ({"a": "one.safetensors"}, "index.json: a is not in one.safetensors"),
    ],
)
def test_odd_indexes_are_one_line(exported, tmp_path, parts, message):
    folder = shutil.copytree(exported, tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    for kind in ("auto", "huggingface", "bert", "official"):
        with pytest.raises(UsageError, match=message):
            open_weights(folder, kind)

    with pytest.raises(UsageError, match=r"index.json"):
        recognise(shutil.copytree(folder, tmp_path / "bert", ignore=lambda *_: ["config.json"]))


@pytest.mark.parametrize(
    "content", [b"\xff\xd8\xff\xe0\0\x10JFIF", b"\x89PNG\r\n", b"", b"hello", b"\x80PNG"]
)
def test_what_is_no_file_of_weights_is_called_so(tmp_path, content):
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(UsageError, match=r"photo.jpg: not a file of weights; expected safetensors"):
        open_weights(tmp_path / "photo.jpg")


def test_names_of_tensors_are_texts(tmp_path):
    torch.save({1: torch.zeros(2)}, tmp_path / "numbers.bin")
    with pytest.raises(
        UsageError, match="not a state dict, expected a mapping from names to tensors"
    ):
        recognise(tmp_path / "numbers.bin")


def test_what_is_passed_over_is_said(tmp_path, monkeypatch, capsys):
    """Check a checkpoint without its manifest, and a dangling `best`."""
    run = tmp_path / "run"
    for step in (1, 3):
        random_source(SIZES, run / f"global_step{step}")

    (run / "best").symlink_to("global_step1")
    load_model(str(run), ("itm",), "torch", torch.device("cpu"))
    convert(monkeypatch, run, "--list")
    assert "note: " not in "".join(capsys.readouterr())

    (run / "best").unlink()
    (run / "best").symlink_to("global_step2")
    _, source = load_model(str(run), ("itm",), "torch", torch.device("cpu"))
    assert source.path.name == "global_step3"
    line = (
        f"note: {run}/best leads to no folder; using global_step3, the newest checkpoint, instead\n"
    )
    assert capsys.readouterr().err == line

    (run / "global_step3" / "manifest.json").unlink()
    line = (
        f"note: {run}/global_step3 has no manifest.json and is not a complete checkpoint; using"
        " global_step1 instead\n"
    )
    convert(monkeypatch, run, "--list")
    assert capsys.readouterr().out.startswith(line)
    load_model(str(run), ("itm",), "torch", torch.device("cpu"))
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [("sharded", "--tp", 2), ("huggingface",), ("official",), ("bert",)]
)
def test_weights_that_are_not_finite_are_named(exported, tmp_path, monkeypatch, capsys, flags):
    spoilt = spoil(exported, tmp_path, float("nan"))
    convert(monkeypatch, spoilt, "--to", *flags, "--output", tmp_path / "out")
    assert re.search(
        "note: NaN or infinity in 1 of [0-9]+ tensors, first in text_embedding.norm.bias; ",
        capsys.readouterr().err,
    )


def test_values_that_a_type_cannot_hold_are_refused(exported, tmp_path, monkeypatch):
    spoilt = spoil(exported, tmp_path, 1e6)
    with pytest.raises(
        UsageError, match=r"text_embedding.norm.bias holds 1e\+06, more than torch.float16 can"
    ):
        convert(
            monkeypatch,
            spoilt,
            "--to",
            "sharded",
            "--dtype",
            "float16",
            "--output",
            tmp_path / "out",
        )

    assert not (tmp_path / "out").exists()
    convert(
        monkeypatch, spoilt, "--to", "sharded", "--dtype", "bfloat16", "--output", tmp_path / "out"
    )


def spoil(exported, tmp_path, value):
    """Copy a Hugging Face folder, and set one element of a tensor to `value`."""
    folder = shutil.copytree(exported, tmp_path / "spoilt")
    tensors = load_file(folder / "model.safetensors")
    tensors["interbert.text_embedding.norm.bias"][0] = value
    save_file(tensors, folder / "model.safetensors")

    return folder
