"""Test that weights with experts convert to every format that can hold them and back, to the bit;
that dense weights become experts with the same outputs, and shared layers untied ones.
"""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_interbert.data.packing import pack
from megatron_interbert.errors import UsageError
from megatron_interbert.hf import (
    InterBertConfig,
    InterBertForImageTextRetrieval,
    InterBertForPreTraining,
    InterBertForSequenceClassification,
)
from megatron_interbert.hf.compare import load_core, random_batch
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.training.first_weights import viewed_as
from megatron_interbert.weights.reader import CheckpointReader
from megatron_interbert.weights.sources import open_weights
from tests.model.test_model import examples
from tests.sizes import WIDER_WEIGHTS
from tests.tools.test_convert import convert, random_source

DENSE = WIDER_WEIGHTS.without_dropout()
SIZES = dataclasses.replace(DENSE, experts=6, prototypes=2)


def loss_of(source):
    """Return the step-0 loss of weights on random samples."""
    batch = pack(examples(4), source.config.feature_dim)
    model = load_core(source)
    task = PretrainingTask()
    with torch.no_grad():
        return task.loss(model(batch), batch, batch.target_counts())[0]


def outputs_of(source):
    batch = random_batch(source.config, np.random.default_rng(5))
    with torch.no_grad():
        output = load_core(source)(batch, everything=True)._asdict()
    return {n: t for n, t in output.items() if t is not None and n != "router_figures"}


def test_experts_go_everywhere_and_come_back(tmp_path, monkeypatch, capsys):
    state = random_source(SIZES, tmp_path / "start")
    convert(
        monkeypatch,
        *(tmp_path / "start", "--to", "huggingface", "--output", tmp_path / "hf", "--verify"),
    )
    printed = capsys.readouterr().out
    assert "verify image_hidden: largest difference 0\n" in printed, printed
    assert "verify msm_logits: largest difference 0\n" in printed, printed
    names = load_file(tmp_path / "hf" / "model.safetensors")
    one = "interbert.interaction.layers.1.mlp.experts.5.up.weight"
    assert torch.equal(names[one], state["interaction.layers.1.mlp.experts.up.weight"][5])

    sharded = (tmp_path / "hf", "--to", "sharded", "--output", tmp_path / "tp4")
    convert(monkeypatch, *sharded, "--tensor-model-parallel-size", "2", "--verify")
    printed = capsys.readouterr().out
    assert "verify itm_logits: largest difference 0\n" in printed
    assert "router_figures" not in printed
    convert(monkeypatch, tmp_path / "tp4", "--to", "huggingface", "--output", tmp_path / "again")
    back = open_weights(tmp_path / "again")
    for name, tensor in state.items():
        assert torch.equal(back.get(name), tensor), name
        assert torch.equal(CheckpointReader(tmp_path / "tp4").get(name), tensor), name


@pytest.mark.parametrize("stacks", ["interaction,text,image", "interaction"])
def test_the_doors_load_train_and_save_experts(stacks, tmp_path, monkeypatch):
    state = random_source(dataclasses.replace(SIZES, expert_stacks=stacks), tmp_path / "start")
    convert(monkeypatch, tmp_path / "start", "--to", "huggingface", "--output", tmp_path / "hf")
    model = InterBertForPreTraining.from_pretrained(tmp_path / "hf")
    for name, parameter in model.interbert.named_parameters():
        assert torch.equal(parameter, state[name]), name

    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[name], written[name]) for name in written)
    expected = outputs_of(open_weights(tmp_path / "start"))
    for name, found in outputs_of(open_weights(tmp_path / "saved")).items():
        assert torch.equal(found, expected[name]), name


def test_the_doors_train_experts_on_texts_alone(tmp_path):
    """Classify texts without images in training mode: routers and experts of texts get gradients,
    those of images none.
    """
    sizes = InterBertConfig(**dataclasses.asdict(SIZES))
    model = InterBertForSequenceClassification(sizes).train()
    words = torch.randint(0, SIZES.vocab_size, (3, 7))
    output = model(input_ids=words, labels=torch.tensor([0, 1, 1]))
    assert output.logits.shape == (3, 2)

    output.loss.backward()
    core = model.interbert
    assert core.text_stream.layers[0].mlp.router.weight.grad.abs().max() > 0
    assert core.interaction.layers[0].mlp.experts.up.weight.grad.abs().max() > 0
    assert core.image_stream.layers[0].mlp.router.weight.grad is None


def test_a_lost_expert_is_named(tmp_path, monkeypatch):
    random_source(SIZES, tmp_path / "start")
    convert(monkeypatch, tmp_path / "start", "--to", "huggingface", "--output", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    lost = "text_stream.layers.0.mlp.experts.3.down.weight"
    del tensors[f"interbert.{lost}"]
    save_file(tensors, file, {"format": "pt"})

    with pytest.raises(UsageError, match=f"{lost} is missing"):
        open_weights(tmp_path / "hf")
    with pytest.raises(UsageError, match=r"text_stream.layers.0.mlp.experts.down.weight"):
        InterBertForImageTextRetrieval.from_pretrained(tmp_path / "hf")


def test_an_expert_of_another_shape_is_named(tmp_path, monkeypatch):
    random_source(SIZES, tmp_path / "start")
    convert(monkeypatch, tmp_path / "start", "--to", "huggingface", "--output", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    other = "text_stream.layers.0.mlp.experts.3.down.weight"
    tensors[f"interbert.{other}"] = tensors[f"interbert.{other}"].T.contiguous()
    save_file(tensors, file, {"format": "pt"})

    with pytest.raises(UsageError, match=f"{other} is of shape"):
        open_weights(tmp_path / "hf")


@pytest.mark.parametrize("target", ["official", "bert"])
def test_formats_without_experts_refuse_them(target, tmp_path, monkeypatch):
    random_source(SIZES, tmp_path / "start")
    with pytest.raises(UsageError, match=f"'{target}' has no experts"):
        convert(monkeypatch, tmp_path / "start", "--to", target, "--output", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("experts", "prototypes"), [(4, 1), (8, 2), (6, 3)])
def test_dense_weights_become_experts_with_the_same_loss(
    experts, prototypes, tmp_path, monkeypatch
):
    random_source(DENSE, tmp_path / "dense")
    sizes = ("--experts", experts, "--prototypes", prototypes)
    convert(
        monkeypatch,
        *(tmp_path / "dense", "--to", "sharded", "--output", tmp_path / "experts", *sizes),
    )
    divided = open_weights(tmp_path / "experts")
    assert (divided.config.experts, divided.config.prototypes) == (experts, prototypes)
    loss = loss_of(divided)
    expected = loss_of(open_weights(tmp_path / "dense"))
    assert abs(loss - expected) < 1e-3 * expected
    assert loss != expected, "gates are near 0, not 0: their choices would all be equal"
    loads = load_core(divided)(random_batch(divided.config, np.random.default_rng(5)))
    assert (loads.router_figures[0, :-4] > 0).sum() > 1

    with pytest.raises(UsageError, match=f"has {experts} experts already"):
        convert(
            monkeypatch,
            *(tmp_path / "experts", "--to", "sharded", "--output", tmp_path / "x", *sizes),
        )


def test_some_stacks_become_experts(tmp_path, monkeypatch, capsys):
    random_source(DENSE, tmp_path / "dense")
    target = ("--to", "sharded", "--output", tmp_path / "experts")
    some = ("--experts", "4", "--expert-stacks", "text")
    convert(monkeypatch, tmp_path / "dense", *target, *some, "--verify")
    printed = capsys.readouterr().out
    changed = float(re.search(r"verify text_hidden: largest difference (\S+)", printed)[1])
    assert 0 < changed < 1e-2, "against the dense model"
    assert "verify image_hidden: largest difference 0\n" in printed
    divided = open_weights(tmp_path / "experts")
    assert divided.config.expert_stacks == "text"
    assert "text_stream.layers.0.mlp.experts.up.weight" in divided.layouts
    assert "interaction.layers.0.mlp.up.weight" in divided.layouts
    expected = loss_of(open_weights(tmp_path / "dense"))
    assert abs(loss_of(divided) - expected) < 1e-3 * expected

    with pytest.raises(UsageError, match="expert_stacks is 'texts', expected some of"):
        convert(
            monkeypatch,
            *(tmp_path / "dense", "--to", "sharded", "--output", tmp_path / "x"),
            *("--experts", "4", "--expert-stacks", "texts"),
        )
    with pytest.raises(UsageError, match="--expert-stacks chooses where --experts puts experts"):
        convert(monkeypatch, tmp_path / "dense", *target, "--expert-stacks", "text")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prototypes": 1}, r"6 experts \(.*\); give --experts 6 --prototypes 2"),
        ({"experts": 4}, "4 experts in 2 prototypes .*; give --experts 6 --prototypes 2"),
        ({"experts": 0, "prototypes": 1}, "no experts; give --experts 6 --prototypes 2"),
        ({"expert_stacks": "text"}, '.*; give --model FILE.json with "expert_stacks": "inter'),
    ],
)
def test_other_experts_are_refused_at_the_start_of_a_run(changes, said, tmp_path):
    random_source(SIZES, tmp_path / "start")
    source = open_weights(tmp_path / "start")
    with pytest.raises(UsageError, match="has 6 experts in 2 prototypes .*, the run's has " + said):
        viewed_as(dataclasses.replace(SIZES, **changes), source, 0)


@pytest.mark.parametrize("experts", [0, 4])
def test_untied_layers_give_the_same_loss_to_the_bit(experts, tmp_path, monkeypatch):
    shared = dataclasses.replace(DENSE, share_layers=True, experts=experts, interaction_layers=3)
    random_source(shared, tmp_path / "shared")
    convert(
        monkeypatch,
        *(tmp_path / "shared", "--to", "huggingface", "--output", tmp_path / "untied"),
        "--untie-layers",
    )
    untied = open_weights(tmp_path / "untied")
    assert not untied.config.share_layers
    assert "interaction.layers.2.mlp_norm.weight" in untied.layouts
    assert torch.equal(loss_of(untied), loss_of(open_weights(tmp_path / "shared")))
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["share_layers"] is False

    with pytest.raises(UsageError, match="its layers are not shared"):
        convert(
            monkeypatch,
            *(tmp_path / "untied", "--to", "sharded", "--output", tmp_path / "x"),
            "--untie-layers",
        )
