"""Saving and loading: bit-equal, strict with a list of what is wrong, files that others can read,
first weights of new heads.
"""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_interbert.errors import UsageError
from megatron_interbert.hf import (
    InterBertConfig,
    InterBertForImageTextRetrieval,
    InterBertForMultipleChoice,
    InterBertForPreTraining,
    InterBertForSequenceClassification,
    InterBertModel,
)
from tests.hf.small import SMALL, build, padded_inputs

ALL = [
    InterBertModel,
    InterBertForPreTraining,
    InterBertForImageTextRetrieval,
    InterBertForMultipleChoice,
    InterBertForSequenceClassification,
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    model = build(InterBertForPreTraining, num_labels=3)
    model.save_pretrained(folder)
    return folder, model.state_dict()


def rewritten(folder, target, change):
    """A copy of a model folder whose tensors went through `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())

    return target


@pytest.mark.parametrize("model_class", ALL)
def test_there_and_back_is_bit_equal(model_class, tmp_path):
    model = build(model_class, num_labels=3)
    model.save_pretrained(tmp_path)
    again, found = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert not again.training
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in again.state_dict().items()
    }
    assert all(p.device.type == "cpu" for p in again.parameters())
    assert all(name.startswith(("interbert.", "classifier.")) for name in again.state_dict())

    if model_class is not InterBertForMultipleChoice:
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                model(**padded_inputs()).to_tuple(),
                again(**padded_inputs()).to_tuple(),
                strict=True,
            )
        )


@pytest.mark.parametrize("model_class", ALL)
def test_pretrained_folder_serves_every_class(model_class, pretrained):
    folder, state = pretrained
    model, found = model_class.from_pretrained(folder, output_loading_info=True)
    new = {name for name in model.state_dict() if name not in state}
    assert set(found["missing_keys"]) == new
    assert all(
        torch.equal(tensor, state[name])
        for name, tensor in model.state_dict().items()
        if name not in new
    )
    for name in new:  # drawn, not left as they were in memory
        tensor = model.state_dict()[name]
        assert (tensor == 0).all() if name.endswith("bias") else 0.05 < tensor.std() < 0.2

    assert new == {
        InterBertForMultipleChoice: {"interbert.choice_head.weight", "interbert.choice_head.bias"},
        InterBertForSequenceClassification: {"classifier.weight", "classifier.bias"},
    }.get(model_class, set())


def test_bfloat16(pretrained, tmp_path):
    folder, state = pretrained
    model = InterBertForPreTraining.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(torch.equal(p, state[name].bfloat16()) for name, p in model.state_dict().items())
    output = model(**padded_inputs())
    exact = InterBertForPreTraining.from_pretrained(folder)(**padded_inputs())
    assert output.text_hidden.dtype == torch.bfloat16
    torch.testing.assert_close(output.text_hidden.float(), exact.text_hidden, rtol=0.1, atol=0.1)
    model.save_pretrained(tmp_path)
    again = InterBertForPreTraining.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())


def test_wrong_weights_are_listed(pretrained, tmp_path):
    def spoil(tensors):
        tensors["interbert.text_stream.layers.0.mlp.extra"] = torch.zeros(1)
        tensors["interbert.itm_head.scale"] = torch.zeros(1)  # of a head that the class has
        del (
            tensors["interbert.image_embedding.norm.weight"],
            tensors["interbert.mrm_head.decoder.bias"],
        )
        tensors["interbert.itm_head.weight"] = torch.zeros(2, 25)

    folder = rewritten(pretrained[0], tmp_path, spoil)
    with pytest.raises(UsageError) as caught:
        InterBertForPreTraining.from_pretrained(folder)

    assert (
        str(caught.value) == f"{folder}: not the weights of this InterBertForPreTraining;"
        " missing: interbert.image_embedding.norm.weight, interbert.mrm_head.decoder.bias;"
        " unexpected: interbert.itm_head.scale, interbert.text_stream.layers.0.mlp.extra;"
        " of another shape: interbert.itm_head.weight [2, 25] instead of [2, 24]"
    )


def test_each_kind_alone_is_an_error(pretrained, tmp_path):
    for number, (change, message) in enumerate(
        [
            (
                lambda t: t.pop("interbert.text_pooler.dense.bias"),
                "missing: interbert.text_pooler.dense.bias$",
            ),
            (lambda t: t.update(other=torch.zeros(1)), "unexpected: other$"),
            (
                lambda t: t.update({"interbert.text_pooler.dense.bias": torch.zeros(3)}),
                r"shape: .*bias \[3\] instead of \[24\]$",
            ),
            (
                lambda t: [t.pop(n) for n in list(t) if "interaction" in n],
                r"missing: (\S+, ){19}\S+ and 4 more$",
            ),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(UsageError, match=message):
            InterBertModel.from_pretrained(rewritten(pretrained[0], tmp_path / str(number), change))


def test_heads_that_pretraining_makes_must_be_there(tmp_path):
    build(InterBertModel).save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match=r"missing: interbert.itm_head.bias, interbert.itm_head.weight$"
    ):
        InterBertForImageTextRetrieval.from_pretrained(tmp_path)


def test_a_classifier_in_the_file_is_no_error_elsewhere(tmp_path):
    model = build(InterBertForSequenceClassification)
    model.save_pretrained(tmp_path)
    core = InterBertModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in core.items())


def test_another_number_of_labels_only_when_said(tmp_path):
    build(InterBertForSequenceClassification, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"classifier.weight \[3, 24\] instead of \[5, 24\]"):
        InterBertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)

    model = InterBertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    assert 0.05 < model.classifier.weight.std() < 0.2


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_mode_of_ordinary_files(mask, tmp_path):
    before = os.umask(mask)
    try:
        build(InterBertForPreTraining).save_pretrained(tmp_path / "x", max_shard_size="100KB")
    finally:
        os.umask(before)

    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "x").iterdir()}
    assert len(files) >= 5  # config, card, index, several shards
    assert set(files.values()) == {0o666 & ~mask}, files
    assert InterBertForPreTraining.from_pretrained(tmp_path / "x")


def test_the_card_of_a_folder_is_kept_unless_facts_are_given(tmp_path):
    model = build(InterBertModel)
    model.save_pretrained(tmp_path)
    assert "library_name: transformers" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    model.save_pretrained(tmp_path, card_facts={"iteration": 321})
    assert "Optimizer steps: 321" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "README.md").exists()


def test_first_weights():
    """Matrices N(0, initializer_range), gains 1, biases 0, nothing uninitialised; by torch's seed
    and no other.
    """
    config = InterBertConfig.from_model_config(SMALL)
    states = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        states.append(InterBertForPreTraining(config).state_dict())

    for name, tensor in states[0].items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif tensor.dim() == 1:
            assert (tensor == 1).all(), name
        elif tensor.numel() > 100:
            drawn = tensor[: SMALL.vocab_size] if name.endswith("word.weight") else tensor
            assert abs(drawn.mean()) < 0.02, name
            assert 0.08 < drawn.std() < 0.12, name

    assert not states[0]["interbert.text_embedding.word.weight"][SMALL.vocab_size :].any()
    name = "interbert.text_pooler.dense.weight"
    assert torch.equal(states[0][name], states[2][name])
    assert not torch.equal(states[0][name], states[1][name])


def test_random_numbers_of_the_process_are_left_alone(pretrained, tmp_path):
    """The core's own stream would seed torch's generator; loading and saving here touch it no more
    than transformers does.
    """
    torch.manual_seed(11)
    before = torch.get_rng_state()
    InterBertForPreTraining.from_pretrained(pretrained[0]).save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_files_outside_of_the_folder_are_not_read(pretrained, tmp_path):
    """Names of files in an index are somebody's; transformers would open them wherever they are."""
    folder = tmp_path / "model"
    shutil.copytree(pretrained[0], folder)
    (folder / "model.safetensors").unlink()
    names = load_file(pretrained[0] / "model.safetensors")
    outside = os.path.relpath(pretrained[0] / "model.safetensors", folder)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, outside)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"model.safetensors', expected a name without folders"):
        InterBertForPreTraining.from_pretrained(folder)


def test_a_model_in_parts_is_read(pretrained, tmp_path):
    model = InterBertForPreTraining.from_pretrained(pretrained[0])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = InterBertForPreTraining.from_pretrained(tmp_path)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())


def test_rights_of_other_files_stay(pretrained, tmp_path):
    private = tmp_path / "private.safetensors"
    private.write_bytes(b"")
    private.chmod(0o600)
    InterBertForPreTraining.from_pretrained(pretrained[0]).save_pretrained(tmp_path)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
