"""Conversion between all formats: bits survive every way there and back, sources are refused or named when they are bad."""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_interbert.config import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.hf import InterBertForPreTraining
from megatron_interbert.hf.compare import load_core, random_batch
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.loading import load_model
from megatron_interbert.weights.manifest import verify, write_manifest
from megatron_interbert.weights.sources import open_source, recognise
from megatron_interbert.weights.targets import Output, write_target
from tests.corpus import write_store
from tests.dist import run_on_ranks
from tests.shared import ORACLE, needs_shared
from tests.training.test_topologies import Run, start

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"
SIZES = ModelConfig(
    vocab_size=150,
    hidden_size=32,
    interaction_layers=2,
    text_layers=2,
    image_layers=1,
    num_attention_heads=4,
    image_attention_heads=8,
    ffn_hidden_size=48,
    pooled_size=24,
    feature_dim=20,
    num_classes=9,
    max_position_embeddings=40,
)


def convert(monkeypatch, *arguments):
    """The tool's main in this process."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    module.main()


def random_source(sizes, folder):
    """A sharded folder of random weights, biases included, made without the converter's readers."""
    from megatron_interbert.weights.files import TensorLayout
    from megatron_interbert.weights.sources import Source

    model = InterBert(sizes)
    initialise(model, sizes, 7, ParallelState())
    generator = torch.Generator().manual_seed(1)
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, tensor in state.items():
        if name.endswith("bias"):
            tensor.normal_(0, 0.1, generator=generator)
    state["msm_head.bias"][sizes.vocab_size :] = 0
    layouts = {n: TensorLayout(t.dtype, tuple(t.shape)) for n, t in state.items()}
    source = Source("checkpoint", Path(folder), sizes, layouts, state.__getitem__)
    write_target("sharded", Output(source), Path(folder))
    return state


def outputs(model, sizes):
    with torch.no_grad():
        return [t for t in model(random_batch(sizes, np.random.default_rng(3))) if t is not None]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def round_trip(sizes, tmp_path, monkeypatch):
    """TP1 -> TP2 -> TP4 -> Hugging Face -> official -> TP1: tensors and outputs as at the beginning, bit for bit."""
    state = random_source(sizes, tmp_path / "tp1")
    first = InterBert(sizes)
    first.load_state_dict(state)
    expected = outputs(first.eval(), sizes)
    del first
    steps = [("sharded", "--tp", 2), ("sharded", "--tp", 4), ("huggingface",), ("official",), ("sharded",)]
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
    back = open_source(before)
    assert back.config == sizes
    assert set(back.layouts) == set(state)
    assert all(torch.equal(back.get(name), state[name]) for name in state)
    assert same(outputs(load_core(back), sizes), expected)


def test_round_trip_small(tmp_path, monkeypatch):
    round_trip(SIZES, tmp_path, monkeypatch)


def test_round_trip_base(tmp_path, monkeypatch):
    round_trip(PRESETS["base"], tmp_path, monkeypatch)


def save_stages(store, folder):
    """A trained checkpoint of each ZeRO stage on two processes, and what the live model answers."""
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
    """The live model's outputs, those of the exported folder, and of what is read back from it: equal bit for bit."""
    store = write_store(tmp_path / "store")
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    run_on_ranks(2, save_stages, str(store), str(tmp_path))
    for stage in range(4):
        live = torch.load(tmp_path / f"zero{stage}.pt")
        convert(monkeypatch, tmp_path / f"zero{stage}", "--to", "huggingface", "--output", tmp_path / f"hf{stage}")
        door = InterBertForPreTraining.from_pretrained(tmp_path / f"hf{stage}").eval()
        sizes = door.config.model_config()
        assert same(outputs(door.interbert, sizes), live), stage
        assert same(outputs(load_core(open_source(tmp_path / f"hf{stage}")), sizes), live), stage
        assert (tmp_path / f"hf{stage}" / "vocab.txt").read_bytes() == (store / "vocab.txt").read_bytes()


@needs_shared
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model_vl.bin"])
def test_official_there_and_back(tmp_path, monkeypatch, name, capsys):
    """The same tensors under the same names, heads included that we have no use for."""
    for number, (source, kind) in enumerate([(ORACLE / name, "sharded"), ("0", "official")]):
        convert(monkeypatch, tmp_path / source, "--to", kind, "--output", tmp_path / str(number), "--verify")
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
    convert(monkeypatch, tmp_path / "ours", "--to", "bert", "--output", tmp_path / "bert", "--verify")
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("verify"):
            assert float(line.split()[-1]) < 1e-5, line
    BertForMaskedLM.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "again")
    back = open_source(tmp_path / "again", config=SIZES)
    assert back.kind == "bert"
    assert back.layouts
    assert all(torch.equal(back.get(name), state[name]) for name in back.layouts)
    with pytest.raises(UsageError, match="BERT has no image side"):
        convert(monkeypatch, tmp_path / "bert", "--model", write_sizes(tmp_path), "--to", "huggingface", "--output", tmp_path / "x")


def write_sizes(folder):
    import dataclasses

    (folder / "sizes.json").write_text(json.dumps(dataclasses.asdict(SIZES)))
    return folder / "sizes.json"


def test_types_and_list(tmp_path, monkeypatch, capsys):
    state = random_source(SIZES, tmp_path / "ours")
    convert(monkeypatch, tmp_path / "ours", "--to", "sharded", "--dtype", "bfloat16", "--output", tmp_path / "half", "--verify")
    half = open_source(tmp_path / "half")
    assert all(torch.equal(half.get(name), tensor.bfloat16()) for name, tensor in state.items())
    difference = float(capsys.readouterr().out.split("verify text_hidden: largest difference ")[1].split()[0])
    assert 1e-5 < difference < 0.2
    convert(monkeypatch, tmp_path / "half", "--list")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[-1].startswith(f"{len(state)} tensors, ")
    listed = {line.split()[0]: line.split()[1:] for line in lines[:-1]}
    assert set(listed) == set(state)
    assert listed["interaction.layers.0.attention.qkv.weight"] == ["96", "x", "32", "bfloat16", "column"]
    assert listed["text_embedding.word.weight"] == ["256", "x", "32", "bfloat16", "vocab"]


def test_large_models_pass_tensor_by_tensor(tmp_path):
    """630 MB of weights are converted with less than 420 MB of memory of its own at a time beyond what the program needs to
    start; the word embedding alone (94 MB) takes up to three. Pages of mapped files do not count: they can be dropped."""
    random_source(PRESETS["base"], tmp_path / "base")
    command = [sys.executable, str(TOOL), str(tmp_path / "base")]
    idle = peak_memory([*command, "--list"])
    for number, flags in enumerate((["sharded", "--tp", "2"], ["official"])):
        assert peak_memory([*command, "--to", *flags, "--output", str(tmp_path / str(number))]) < idle + 420e6
    code = "import sys; from megatron_interbert.weights.sources import *; s = open_source(sys.argv[1]);"
    code += "x = {n: t.clone() for n, t in s.state().items()}"
    assert peak_memory([sys.executable, "-c", code, str(tmp_path / "base")]) > idle + 500e6, "a whole model would be noticed"


def peak_memory(command):
    """Largest anonymous memory (bytes) of a process, looked at every 5 ms."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            peak = max(peak, int(Path(f"/proc/{process.pid}/status").read_text().split("RssAnon:")[1].split()[0]))
        time.sleep(0.005)
    assert process.returncode == 0
    return peak * 1024


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def evil_file(path, proof):
    buffer = io.BytesIO()
    torch.save({"bert.embeddings.word_embeddings.weight": torch.zeros(2, 2), "x": Evil(proof)}, buffer)
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
    evil_file(tmp_path / "foreign" / "global_step1" / "mp_rank_00_model_states.pt", tmp_path / "ran")
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
        ("words.txt",): "no file of weights; expected one of safetensors",
        ("resnet.bin",): "neither one of our checkpoints",
        ("half.bin",): "no preset has these sizes",
        ("half.bin", "--model", "base"): "not an official InterBERT state dict",
        ("damaged",): "has another sha256",
        ("missing",): "is missing",
        ("truncated",): "has 1000 bytes, expected",
        ("foreign",): "a DeepSpeed checkpoint that we did not write",
        ("evil.bin",): "would run code",
        ("plain.bin",): "would run code",
        ("good", "--tp", 3): "--tp 3 does not divide",
        ("good", "--tp", 2, "--to", "official"): "only 'sharded' has one file per tensor-parallel rank",
        ("good", "--output", tmp_path / "other"): "exists already",
        ("good", "--from", "official"): "neither manifest.json, nor model.safetensors",
        ("good", "--vocab-file", tmp_path / "words.txt"): "1 entries, the model has 150",
    }
    bad |= nonsense(tmp_path)
    listing = sorted(p.name for p in tmp_path.iterdir())
    for (name, *flags), message in bad.items():
        with pytest.raises(UsageError, match=message):
            convert(monkeypatch, tmp_path / name, "--to", "sharded", "--output", tmp_path / "out", *flags)
        assert sorted(p.name for p in tmp_path.iterdir()) == listing, name
    assert not (tmp_path / "ran").exists(), "code from a pickle was run"


def nonsense(folder):
    """Files that are well formed and mean nothing: manifests with a right hash of their own, types nobody has."""
    manifests = {"list": [], "strings": {"files": {"a": "b"}, "topology": {}}, "sizes": {"files": {}, "topology": {}}}
    for name, content in manifests.items():
        (folder / name).mkdir()
        write_manifest(folder / name, content) if content else (folder / name / "manifest.json").write_text("[]")
    header = json.dumps({"bert.v_embeddings.x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (folder / "f8.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    (folder / "index").mkdir()
    (folder / "index" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../nothing.safetensors"}}')
    return {
        ("list",): "not the manifest of a checkpoint",
        ("strings",): "lists files without their sizes",
        ("sizes",): "not a sound checkpoint",
        ("f8.safetensors",): "is of type F8_E4M3",
        ("index",): r"the file of a is '../nothing.safetensors', expected a name without folders",
    }


def test_no_space(tmp_path, monkeypatch):
    """Both ways to find out: before writing, and when the disk fills up meanwhile."""
    random_source(SIZES, tmp_path / "good")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", small], capture_output=True).returncode:
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
    result = subprocess.run([sys.executable, TOOL, tmp_path / "none", "--list"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path / 'none'}: no such file or folder\n"


def test_every_format_starts_a_model(tmp_path, monkeypatch):
    """`--init-from` and `evaluate --load` read what the converter writes."""
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    random_source(SIZES, folder / "ours")
    write_target("huggingface", Output(open_source(folder / "ours")), folder / "hf")
    return folder / "hf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_facts": [1]}, r"config.json: training_facts is \[1\], expected an object"),
        ({"training_facts": "a"}, r"config.json: training_facts is 'a', expected an object"),
        ({"training_facts": {"vocabulary": ["a"]}}, r"vocabulary of training_facts is \['a'\], expected str"),
        ({"training_facts": {"detector": 5}}, "detector of training_facts is 5, expected dict"),
        ({"num_attention_heads": 0}, "config.json: model: num_attention_heads is 0, expected a whole number"),
        ({"num_attention_heads": 5}, "config.json: model: hidden_size 32 is not a multiple"),
        ({"interaction_layers": 10**7}, "interaction_layers is 10000000, expected a whole number from 0 to 1000"),
    ],
)
def test_odd_configurations_are_one_line(exported, tmp_path, changes, message):
    folder = shutil.copytree(exported, tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(UsageError, match=message):
        open_source(folder)


def test_only_facts_that_the_converter_writes_are_believed(exported, tmp_path):
    """A `run` or `files` in somebody's config.json would stand for what our own checkpoints say."""
    folder = shutil.copytree(exported, tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    facts = {"run": 5, "files": [1], "task": {}, "iteration": 7, "detector": None}
    (folder / "config.json").write_text(json.dumps({**values, "training_facts": facts}))
    assert open_source(folder).facts == {"iteration": 7}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["a"], r"index.json: weight_map is \['a'\], expected names of tensors with names of files"),
        (None, "weight_map is None"),
        ({"a": 5}, "the file of a is 5, expected a name without folders"),
        ({"a": "../hf/model.safetensors"}, "the file of a is '../hf/model.safetensors', expected a name without folders"),
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
            open_source(folder, kind)
    with pytest.raises(UsageError, match=r"index.json"):
        recognise(shutil.copytree(folder, tmp_path / "bert", ignore=lambda *_: ["config.json"]))


def test_parts_that_do_not_fit_are_one_line(tmp_path):
    random_source(SIZES, tmp_path / "ours")
    write_target("bert", Output(open_source(tmp_path / "ours")), tmp_path / "bert")
    tensors = load_file(tmp_path / "bert" / "model.safetensors")
    tensors["bert.encoder.layer.0.attention.self.query.weight"] = torch.zeros(3, 5)
    save_file(tensors, tmp_path / "bert" / "model.safetensors")
    source = open_source(tmp_path / "bert", config=SIZES)
    with pytest.raises(UsageError, match=r"bert: interaction.layers.0.attention.qkv.weight: not a sound bert source"):
        source.state()


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0\0\x10JFIF", b"\x89PNG\r\n", b"", b"hello", b"\x80PNG"])
def test_what_is_no_file_of_weights_is_called_so(tmp_path, content):
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(UsageError, match=r"photo.jpg: no file of weights; expected one of safetensors"):
        open_source(tmp_path / "photo.jpg")


def test_names_of_tensors_are_texts(tmp_path):
    torch.save({1: torch.zeros(2)}, tmp_path / "numbers.bin")
    with pytest.raises(UsageError, match="not a state dict, expected a mapping from names to tensors"):
        recognise(tmp_path / "numbers.bin")


def test_what_is_passed_over_is_said(tmp_path, monkeypatch, capsys):
    """A checkpoint without its manifest, and a `best` that leads nowhere."""
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
    line = f"note: {run}/best leads nowhere; global_step3, the newest checkpoint, is taken instead\n"
    assert capsys.readouterr().err == line

    (run / "global_step3" / "manifest.json").unlink()
    line = f"note: {run}/global_step3 has no manifest.json and is no whole checkpoint; global_step1 is taken instead\n"
    convert(monkeypatch, run, "--list")
    assert capsys.readouterr().out.startswith(line)
    load_model(str(run), ("itm",), "torch", torch.device("cpu"))
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("sharded", "--tp", 2), ("huggingface",), ("official",), ("bert",)])
def test_weights_that_are_not_finite_are_named(exported, tmp_path, monkeypatch, capsys, flags):
    spoilt = spoil(exported, tmp_path, float("nan"))
    convert(monkeypatch, spoilt, "--to", *flags, "--output", tmp_path / "out")
    assert re.search("note: NaN or infinity in 1 of [0-9]+ tensors, first in text_embedding.norm.bias; ", capsys.readouterr().err)


def test_values_that_a_type_cannot_hold_are_refused(exported, tmp_path, monkeypatch):
    spoilt = spoil(exported, tmp_path, 1e6)
    with pytest.raises(UsageError, match=r"text_embedding.norm.bias holds 1e\+06, more than torch.float16 can"):
        convert(monkeypatch, spoilt, "--to", "sharded", "--dtype", "float16", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(monkeypatch, spoilt, "--to", "sharded", "--dtype", "bfloat16", "--output", tmp_path / "out")


def spoil(exported, tmp_path, value):
    """A copy of a Hugging Face folder with one odd number."""
    folder = shutil.copytree(exported, tmp_path / "spoilt")
    tensors = load_file(folder / "model.safetensors")
    tensors["interbert.text_embedding.norm.bias"][0] = value
    save_file(tensors, folder / "model.safetensors")
    return folder
