"""Test that a BERT in any of its public spellings starts a run, and that BERT for other programs is
refused with the command that makes it readable.
"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_interbert.errors import UsageError
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.first_weights import load_initial_weights
from megatron_interbert.weights.reader import CheckpointReader
from megatron_interbert.weights.sources import open_weights, recognise
from tests.corpus import VOCABULARY
from tests.launching import TINY, launch, pretrain
from tests.sizes import FOR_EIGHT_RANKS as SIZES
from tests.tools.test_other_weights import make


def old_names(state):
    """Return a state dict with the LayerNorm names that came from TensorFlow."""
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in state.items()
    }


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def bare(state):
    """Return the encoder's part of a state dict, named as a BertModel's."""
    return {
        name.removeprefix("bert."): tensor
        for name, tensor in state.items()
        if name.startswith("bert.")
    }


def perturbed(model):
    """Give a model's LayerNorms and biases values other than 1 and 0, which could hide a mix-up."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)

    return model


def spellings():
    """Return name -> (model of transformers, state dict or checkpoint as it is spread)."""
    whole = perturbed(make("BertForPreTraining"))
    state = whole.state_dict()
    plain = {name: tensor for name, tensor in state.items() if "predictions.decoder" not in name}
    no_pooler = {name: tensor for name, tensor in state.items() if "pooler" not in name}
    buffers = {
        "bert.embeddings.position_ids": torch.arange(40)[None],
        "bert.embeddings.token_type_ids": torch.zeros(1, 40, dtype=torch.long),
    }
    answers = perturbed(make("BertForQuestionAnswering"))
    names = perturbed(make("BertForTokenClassification", num_labels=9))
    deeper = perturbed(make("BertForPreTraining", num_hidden_layers=6))

    return {
        "as in 2018": (whole, old_names(plain)),
        "today": (whole, state),
        "with buffers": (whole, {**state, **buffers}),
        "bare, with a buffer": (whole, {**bare(state), "embeddings.position_ids": torch.zeros(1)}),
        "bare, of 2018": (whole, old_names(bare(state))),
        "without pooler": (whole, no_pooler),
        "bare, without pooler": (whole, bare(no_pooler)),
        "DDP": (whole, prefixed("module.", state)),
        "DDP of a bare one": (whole, prefixed("module.", bare(state))),
        "Lightning": (whole, {"state_dict": prefixed("model.", state), "epoch": 3}),
        "compiled": (whole, prefixed("_orig_mod.module.", state)),
        "checkpoint": (whole, {"model": state, "optimizer": {"state": {}}, "step": 7}),
        "DeepSpeed's module": (whole, {"module": state, "global_steps": 7}),
        "wrapped twice": (whole, {"model": {"state_dict": state}}),
        "questions": (answers, answers.state_dict()),
        "names, nine labels": (names, names.state_dict()),
        "deeper": (deeper, deeper.state_dict()),
        "half": (whole, {name: tensor.half() for name, tensor in state.items()}),
    }


def check_started(path, theirs):
    """Load --init-from into a model, and compare with the values of transformers' model."""
    ours = InterBert(SIZES, ("msm", "mrm", "itm", "sentence"))
    for parameter in ours.parameters():
        torch.nn.init.constant_(parameter, 7.0)

    loaded = load_initial_weights(ours, SIZES, str(path), ParallelState())
    state = ours.state_dict()
    encoder = theirs.bert
    embeddings = encoder.embeddings
    pairs = [
        (state["text_embedding.word.weight"][:150], embeddings.word_embeddings.weight),
        (state["text_embedding.position.weight"], embeddings.position_embeddings.weight),
        (state["text_embedding.norm.weight"], embeddings.LayerNorm.weight),
        (state["text_embedding.norm.bias"], embeddings.LayerNorm.bias),
    ]
    for number in range(4):
        name = f"{('interaction', 'text_stream')[number // 2]}.layers.{number % 2}"
        layer = encoder.encoder.layer[number]
        query = state[f"{name}.attention.qkv.weight"].view(4, 3, 8, 32)[:, 0].reshape(32, 32)
        pairs += [
            (query, layer.attention.self.query.weight),
            (state[f"{name}.mlp.up.weight"], layer.intermediate.dense.weight),
            (state[f"{name}.mlp_norm.linear_bias"], layer.output.dense.bias),
            (state[f"{name}.mlp_norm.weight"], layer.output.LayerNorm.weight),
        ]

    for number, (found, expected) in enumerate(pairs):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-3, msg=f"{number}")

    untouched = {name for name in state if name not in loaded}
    assert all(bool((state[name] == 7).all()) for name in untouched)
    assert {name for name in untouched if name.startswith(("interaction", "text_"))} == {
        "text_pooler.dense.weight",
        "text_pooler.dense.bias",
    }
    return loaded


def test_every_spelling_starts_a_model(tmp_path):
    for number, (name, (theirs, content)) in enumerate(spellings().items()):
        path = tmp_path / f"{number}.bin"
        torch.save(content, path)
        assert recognise(path) == "bert", name
        loaded = check_started(path, theirs)
        assert ("sentence_head.dense.weight" in loaded) == (
            "pooler" not in name and name not in ("questions", "names, nine labels")
        ), name
        assert "sentence_head.output.weight" not in loaded, name


def test_a_head_of_as_many_labels_is_taken(tmp_path):
    theirs = perturbed(make("BertForSequenceClassification"))
    torch.save(theirs.state_dict(), tmp_path / "two.bin")
    assert "sentence_head.output.weight" in check_started(tmp_path / "two.bin", theirs)


def test_every_form_of_a_folder_starts_a_model(tmp_path):
    """Check whole and sharded, safetensors and torch, the index itself, and both side by side."""
    theirs = perturbed(make("BertForMaskedLM"))
    state = theirs.state_dict()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    index = "model.safetensors.index.json"

    torch_parts = tmp_path / "torch parts"
    torch_parts.mkdir()
    parts = json.loads((tmp_path / "parts" / index).read_text())["weight_map"]
    parts = {name: f"pytorch_{file.removesuffix('safetensors')}bin" for name, file in parts.items()}
    for file in set(parts.values()):
        torch.save({name: state[name] for name in parts if parts[name] == file}, torch_parts / file)
    (torch_parts / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))

    both = tmp_path / "both"
    both.mkdir()
    save_file(load_file(tmp_path / "whole" / "model.safetensors"), both / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save(zeros, both / "pytorch_model.bin")  # transformers prefers the other one

    plain = tmp_path / "torch"
    plain.mkdir()
    torch.save(old_names(state), plain / "pytorch_model.bin")
    (plain / "config.json").write_text('{"model_type": "bert"}')
    (plain / "tf_model.h5").write_bytes(b"\x89HDF")  # beside it, of no use

    for path in (
        *(tmp_path / "whole", tmp_path / "parts", tmp_path / "parts" / index),
        *(torch_parts, torch_parts / "pytorch_model.bin.index.json", both, plain),
    ):
        assert recognise(path) == "bert", path
        check_started(path, theirs)

    (torch_parts / sorted(set(parts.values()))[0]).unlink()
    with pytest.raises(UsageError, match=r"pytorch_model-00001-of-\d+.bin: cannot be read"):
        open_weights(torch_parts, config=SIZES)


def test_a_chinese_bert_brings_its_vocabulary(tmp_path):
    """Check the size of the vocabulary of bert-base-chinese, and a file cut to its words alone."""
    name = "bert.embeddings.word_embeddings.weight"
    torch.save({name: torch.zeros(1).expand(21128, 768)}, tmp_path / "chinese.bin")
    with pytest.raises(UsageError, match=r"position_embeddings.weight is missing; not BERT of"):
        open_weights(tmp_path / "chinese.bin")

    theirs = make("BertModel", vocab_size=21128)
    torch.save(theirs.state_dict(), tmp_path / "small.bin")
    with pytest.raises(UsageError, match="vocabulary of 21128 entries, the model has 150; give"):
        open_weights(tmp_path / "small.bin", config=SIZES)

    wider = dataclasses.replace(SIZES, vocab_size=21128)
    assert open_weights(tmp_path / "small.bin", config=wider).layouts[
        "text_embedding.word.weight"
    ].shape == (wider.padded_vocab_size, 32)


def test_bert_for_other_programs_is_refused_with_what_to_do(tmp_path):
    google = tmp_path / "uncased_L-12_H-768_A-12"
    google.mkdir()
    for name in ("index", "meta", "data-00000-of-00001"):
        (google / f"bert_model.ckpt.{name}").write_bytes(b"\0\1")
    (google / "vocab.txt").write_text("a")

    message = (
        "a TensorFlow checkpoint; make a torch file of it with transformers 4 and tensorflow: .*"
        rf"convert_bert_original_tf_checkpoint_to_pytorch --tf_checkpoint_path {google}/bert_model"
        r"\.ckpt --bert_config_file .*/bert_config\.json --pytorch_dump_path pytorch_model\.bin"
    )
    for path in (google, google / "bert_model.ckpt", *google.glob("bert_model.*")):
        for read in (recognise, lambda path: open_weights(path, "bert", SIZES)):
            with pytest.raises(UsageError, match=message) as error:
                read(path)
            assert str(error.value).startswith(f"{path}: ")

    for name, flag in (("tf_model.h5", "from_tf"), ("flax_model.msgpack", "from_flax")):
        folder = tmp_path / flag
        folder.mkdir()
        (folder / name).write_bytes(b"\0\1")
        for path in (folder, folder / name):
            with pytest.raises(UsageError, match=rf"{name} holds weights for .*{flag}=True"):
                recognise(path)

    with pytest.raises(UsageError, match="no such file or folder"):
        recognise(tmp_path / "other.ckpt")


def test_a_folder_of_2018_starts_a_run(store, tmp_path):
    """Check `pretrain` with BERT's oldest spelling: at rate 0 its values are what is kept."""
    sizes = PRESETS["tiny"]
    theirs = make(
        "BertForPreTraining",
        vocab_size=len(VOCABULARY),
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.interaction_layers + sizes.text_layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.ffn_hidden_size,
        max_position_embeddings=sizes.max_position_embeddings,
    )
    perturbed(theirs)
    folder = tmp_path / "bert"
    folder.mkdir()
    torch.save(old_names(theirs.state_dict()), folder / "pytorch_model.bin")
    code, out, err = launch(
        *pretrain("--data-path", store, *TINY, "--lr", 0, "--train-iters", 1),
        *("--save", tmp_path / "run", "--init-from", folder),
    )
    assert code == 0, out + err

    kept = CheckpointReader(tmp_path / "run" / "global_step1")
    assert torch.equal(
        kept.get("text_stream.layers.0.mlp_norm.weight"),
        theirs.bert.encoder.layer[sizes.interaction_layers].output.LayerNorm.weight,
    )
    assert torch.equal(
        kept.get("msm_head.transform.norm.bias"), theirs.cls.predictions.transform.LayerNorm.bias
    )
