"""Test conversion between all formats: every round trip is exact to the bit, and bad sources are
refused and named.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_interbert.command_line import read_options
from megatron_interbert.commands import convert as command
from megatron_interbert.errors import UsageError
from megatron_interbert.hf import InterBertForPreTraining
from megatron_interbert.hf.compare import load_core, random_batch
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.loading import load_model
from megatron_interbert.weights.manifest import verify, write_manifest
from megatron_interbert.weights.output import Output
from megatron_interbert.weights.sources import open_weights
from megatron_interbert.weights.targets import write_target
from tests.corpus import write_store
from tests.dist import run_on_ranks
from tests.shared import ORACLE, needs_shared
from tests.sizes import FOR_EIGHT_RANKS as SIZES
from tests.training.test_topologies import Run, start

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"


def convert(monkeypatch, *arguments):
    """Run the tool in this process."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    command.run(read_options(command.Options))


def random_source(sizes, folder):
    """Write a sharded folder of random weights, biases too, without the converter's readers."""
    from megatron_interbert.weights.sources import WeightSource
    from megatron_interbert.weights.tensor_files import TensorLayout

    model = InterBert(sizes)
    initialise(model, sizes, 7, ParallelState())
    generator = torch.Generator().manual_seed(1)
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, tensor in state.items():
        if name.endswith("bias"):
            tensor.normal_(0, 0.1, generator=generator)

    state["msm_head.bias"][sizes.vocab_size :] = 0
    layouts = {n: TensorLayout(t.dtype, tuple(t.shape)) for n, t in state.items()}
    source = WeightSource("checkpoint", Path(folder), sizes, layouts, state.__getitem__)
    write_target("sharded", Output(source), Path(folder))

    return state


def outputs(model, sizes):
    with torch.no_grad():
        return [t for t in model(random_batch(sizes, np.random.default_rng(3))) if t is not None]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def round_trip(sizes, tmp_path, monkeypatch):
    """Convert TP1 -> TP2 -> TP4 -> Hugging Face -> official -> TP1, and compare tensors and outputs
    with the first, bit for bit.
    """
    state = random_source(sizes, tmp_path / "tp1")
    first = InterBert(sizes)
    first.load_state_dict(state)
    expected = outputs(first.eval(), sizes)
    del first
    steps = [
        ("sharded", "--tp", 2),
        ("sharded", "--tp", 4),
        ("huggingface",),
        ("official",),
        ("sharded",),
    ]
    before = tmp_path / "tp1"

    for number, (kind, *flags) in enumerate(steps):
        after = tmp_path / f"{number}-{kind}"
        convert(monkeypatch, before, "--to", kind, *flags, "--output", after)
        if kind == "sharded":
            assert verify(after) is None
        if kind == "huggingface":
            door = InterBertForPreTraining.from_pretrained(after).eval()
            assert same(outputs(door.interbert, sizes), expected)
            del door

        shutil.rmtree(before)
        before = after

    back = open_weights(before)
    assert back.config == sizes
    assert set(back.layouts) == set(state)
    assert all(torch.equal(back.get(name), state[name]) for name in state)
    assert same(outputs(load_core(back), sizes), expected)


def test_round_trip_small(tmp_path, monkeypatch):
    round_trip(SIZES, tmp_path, monkeypatch)


def test_round_trip_base(tmp_path, monkeypatch):
    """Check the widths of base; its stacks are cut to two layers, which differ in nothing else."""
    two = dict.fromkeys(("interaction_layers", "text_layers", "image_layers"), 2)
    round_trip(dataclasses.replace(PRESETS["base"], **two), tmp_path, monkeypatch)


def save_stages(store, folder):
    """Train and save at each ZeRO stage on two processes; save the live model's outputs too."""
    start()

    for stage in range(4):
        run = Run(store, f"{folder}/zero{stage}", 1, stage)
        run.train(2)
        run.save()
        run.engine.deepspeed.eval()
        answer = outputs(run.engine.forward, run.sizes)
        if run.state.is_main:
            torch.save(answer, f"{folder}/zero{stage}.pt")


def test_every_zero_stage_to_hugging_face_and_back(tmp_path, monkeypatch):
    """Check that the outputs of the live model, of the exported folder, and of the weights read
    back from it are equal to the bit.
    """
    store = write_store(tmp_path / "store")
    (tmp_path / "zero3.json").write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    )
    run_on_ranks(2, save_stages, str(store), str(tmp_path))

    for stage in range(4):
        live = torch.load(tmp_path / f"zero{stage}.pt")
        convert(
            monkeypatch,
            tmp_path / f"zero{stage}",
            "--to",
            "huggingface",
            "--output",
            tmp_path / f"hf{stage}",
        )
        door = InterBertForPreTraining.from_pretrained(tmp_path / f"hf{stage}").eval()
        sizes = door.config.model_config()
        assert same(outputs(door.interbert, sizes), live), stage
        assert same(outputs(load_core(open_weights(tmp_path / f"hf{stage}")), sizes), live), stage
        assert (tmp_path / f"hf{stage}" / "vocab.txt").read_bytes() == (
            store / "vocab.txt"
        ).read_bytes()


@needs_shared
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model_vl.bin"])
def test_official_there_and_back(tmp_path, monkeypatch, name, capsys):
    """Check for the same tensors and names, including heads that our model lacks."""
    for number, (source, kind) in enumerate([(ORACLE / name, "sharded"), ("0", "official")]):
        convert(
            monkeypatch,
            tmp_path / source,
            "--to",
            kind,
            "--output",
            tmp_path / str(number),
            "--verify",
        )

    source = torch.load(ORACLE / name, weights_only=True)
    back = torch.load(tmp_path / "1" / "pytorch_model.bin", weights_only=True)
    assert set(back) == set(source)
    assert all(torch.equal(back[n], source[n]) for n in source)
    official = json.loads((ORACLE / "config.json").read_text())
    ours = json.loads((tmp_path / "1" / "config.json").read_text())
    assert {k: v for k, v in official.items() if k in ours} == ours
    assert "verify itm_logits: largest difference 0\n" in capsys.readouterr().out


def test_bert_there_and_back(tmp_path, monkeypatch, capsys):
    from transformers import BertForMaskedLM

    state = random_source(SIZES, tmp_path / "ours")
    convert(
        monkeypatch, tmp_path / "ours", "--to", "bert", "--output", tmp_path / "bert", "--verify"
    )
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("verify"):
            assert float(line.split()[-1]) < 1e-5, line

    BertForMaskedLM.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "again")
    back = open_weights(tmp_path / "again", config=SIZES)
    assert back.kind == "bert"
    assert back.layouts
    assert all(torch.equal(back.get(name), state[name]) for name in back.layouts)

    with pytest.raises(UsageError, match="BERT has no image side"):
        convert(
            monkeypatch,
            tmp_path / "bert",
            "--model",
            write_sizes(tmp_path),
            "--to",
            "huggingface",
            "--output",
            tmp_path / "x",
        )


def write_sizes(folder):
    import dataclasses

    (folder / "sizes.json").write_text(json.dumps(dataclasses.asdict(SIZES)))
    return folder / "sizes.json"


def test_types_and_list(tmp_path, monkeypatch, capsys):
    state = random_source(SIZES, tmp_path / "ours")
    convert(
        monkeypatch,
        tmp_path / "ours",
        "--to",
        "sharded",
        "--dtype",
        "bfloat16",
        "--output",
        tmp_path / "half",
        "--verify",
    )
    half = open_weights(tmp_path / "half")
    assert all(torch.equal(half.get(name), tensor.bfloat16()) for name, tensor in state.items())
    difference = float(
        capsys.readouterr().out.split("verify text_hidden: largest difference ")[1].split()[0]
    )
    assert 1e-5 < difference < 0.2
    convert(monkeypatch, tmp_path / "half", "--list")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[-1].startswith(f"{len(state)} tensors, ")
    listed = {line.split()[0]: line.split()[1:] for line in lines[:-1]}
    assert set(listed) == set(state)
    assert listed["interaction.layers.0.attention.qkv.weight"] == [
        "96",
        "x",
        "32",
        "bfloat16",
        "column",
    ]
    assert listed["text_embedding.word.weight"] == ["256", "x", "32", "bfloat16", "vocab"]


def test_large_models_pass_tensor_by_tensor(tmp_path):
    """Check that 630 MB of weights are converted with less than 420 MB of anonymous memory beyond
    what the program needs to start.

    The word embedding alone (94 MB) is held up to three times. Pages of mapped files do not count:
    they can be dropped.
    """
    random_source(PRESETS["base"], tmp_path / "base")
    command = [sys.executable, str(TOOL), str(tmp_path / "base")]
    idle = peak_memory([*command, "--list"])

    for number, flags in enumerate((["sharded", "--tp", "2"], ["official"])):
        assert (
            peak_memory([*command, "--to", *flags, "--output", str(tmp_path / str(number))])
            < idle + 420e6
        )

    code = (
        "import sys; from megatron_interbert.weights.sources import *; s ="
        " open_weights(sys.argv[1]);"
    )
    code += "x = {n: s.get(n).clone() for n in s.layouts}"
    assert peak_memory([sys.executable, "-c", code, str(tmp_path / "base")]) > idle + 500e6, (
        "a whole model would be noticed"
    )


def peak_memory(command):
    """Run a command; return its peak anonymous memory in bytes, sampled every 5 ms."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = 0

    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            peak = max(
                peak,
                int(
                    Path(f"/proc/{process.pid}/status").read_text().split("RssAnon:")[1].split()[0]
                ),
            )

        time.sleep(0.005)

    assert process.returncode == 0

    return peak * 1024


class Evil:
    """Create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def evil_file(path, proof):
    buffer = io.BytesIO()
    torch.save(
        {"bert.embeddings.word_embeddings.weight": torch.zeros(2, 2), "x": Evil(proof)}, buffer
    )
    path.write_bytes(buffer.getvalue())


def test_bad_input_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    random_source(SIZES, good := tmp_path / "good")
    for name in ("damaged", "missing", "truncated", "foreign", "other"):
        shutil.copytree(good, tmp_path / name)

    weights = next((tmp_path / "damaged").glob("weights-*"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    next((tmp_path / "missing").glob("weights-*")).unlink()
    os.truncate(next((tmp_path / "truncated").glob("weights-*")), 1000)
    shutil.rmtree(tmp_path / "foreign")
    (tmp_path / "foreign" / "global_step1").mkdir(parents=True)
    evil_file(
        tmp_path / "foreign" / "global_step1" / "mp_rank_00_model_states.pt", tmp_path / "ran"
    )
    evil_file(tmp_path / "evil.bin", tmp_path / "ran")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "resnet.bin")
    (tmp_path / "words.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    untied = {"bert.v_embeddings.x": torch.zeros(1)}
    torch.save(untied, tmp_path / "half.bin")
    bad = {
        ("nothing",): "no such file or folder",
        ("empty",): "no checkpoint there",
        ("words.txt",): "not a file of weights; expected safetensors",
        ("resnet.bin",): "neither one of our checkpoints",
        ("half.bin",): "word_embeddings.weight is missing; not an official InterBERT",
        ("half.bin", "--model", "base"): "not an official InterBERT state dict",
        ("damaged",): "has another sha256",
        ("missing",): "is missing",
        ("truncated",): "has 1000 bytes, expected",
        ("foreign",): "a DeepSpeed checkpoint that we did not write",
        ("evil.bin",): "would run code",
        ("plain.bin",): "would run code",
        ("good", "--tp", 3): "--tensor-model-parallel-size 3 does not divide",
        (
            "good",
            "--tp",
            2,
            "--to",
            "official",
        ): "only 'sharded' has one file per tensor-parallel rank",
        ("good", "--output", tmp_path / "other"): "exists already",
        ("good", "--from", "official"): "expected manifest.json, model.safetensors",
        ("good", "--vocab-file", tmp_path / "words.txt"): "1 entries, the model has 150",
    }
    bad |= nonsense(tmp_path)
    listing = sorted(p.name for p in tmp_path.iterdir())

    for (name, *flags), message in bad.items():
        with pytest.raises(UsageError, match=message):
            convert(
                monkeypatch,
                tmp_path / name,
                "--to",
                "sharded",
                "--output",
                tmp_path / "out",
                *flags,
            )

        assert sorted(p.name for p in tmp_path.iterdir()) == listing, name

    assert not (tmp_path / "ran").exists(), "code from a pickle was run"


def nonsense(folder):
    """Write well-formed files with meaningless content: manifests with a valid hash of their own,
    unknown dtypes. Return {arguments: part of the message}.
    """
    manifests = {
        "list": [],
        "strings": {"files": {"a": "b"}, "topology": {}},
        "sizes": {"files": {}, "topology": {}},
    }
    for name, content in manifests.items():
        (folder / name).mkdir()
        (
            write_manifest(folder / name, content)
            if content
            else (folder / name / "manifest.json").write_text("[]")
        )

    header = json.dumps(
        {"bert.v_embeddings.x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}
    ).encode()
    (folder / "f8.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    (folder / "index").mkdir()
    (folder / "index" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../nothing.safetensors"}}'
    )

    return {
        ("list",): "not the manifest of a checkpoint",
        ("strings",): "lists files without their sizes",
        ("sizes",): "not a sound checkpoint",
        ("f8.safetensors",): "is of type F8_E4M3",
        ("index",): r"the file of a is '../nothing.safetensors', expected a name without folders",
    }


def test_no_space(tmp_path, monkeypatch):
    """Check lack of space found before writing, and a disk that fills up meanwhile."""
    random_source(SIZES, tmp_path / "good")
    small = tmp_path / "small"
    small.mkdir()

    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", small], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a small disk here")

    try:
        with pytest.raises(UsageError, match="GB free"):
            convert(monkeypatch, tmp_path / "good", "--to", "sharded", "--output", small / "x")

        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
        for kind in ("sharded", "official", "huggingface"):
            with pytest.raises(UsageError, match="cannot be written"):
                convert(monkeypatch, tmp_path / "good", "--to", kind, "--output", small / "x")
            assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_exit_code_and_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, TOOL, tmp_path / "none", "--list"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path / 'none'}: no such file or folder\n"


def test_every_format_starts_a_model(tmp_path, monkeypatch):
    """Check that `--init-from` and `evaluate --load` read what the converter writes."""
    from megatron_interbert.training.first_weights import load_initial_weights

    state = random_source(SIZES, tmp_path / "tp1")
    for kind, *flags in (("sharded", "--tp", 4), ("huggingface",), ("official",)):
        convert(monkeypatch, tmp_path / "tp1", "--to", kind, *flags, "--output", tmp_path / kind)
        model = InterBert(SIZES)
        initialise(model, SIZES, 0, ParallelState())
        load_initial_weights(model, SIZES, str(tmp_path / kind), ParallelState())
        assert all(torch.equal(p, state[n]) for n, p in model.named_parameters()), kind
        loaded, source = load_model(str(tmp_path / kind), ("itm",), "auto", torch.device("cpu"))
        assert all(torch.equal(p, state[n]) for n, p in loaded.named_parameters()), kind
        assert source.config == SIZES
