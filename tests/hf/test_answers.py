"""The doors give the official model's answers from its own padded inputs, and BERT's for text
alone.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.hf import (
    InterBertConfig,
    InterBertForMultipleChoice,
    InterBertForPreTraining,
)
from tests.hf.small import (
    SMALL,
    TEXT,
    TEXT_HOLES,
    build,
    from_foreign,
    padded_inputs,
    text_only,
    to_official,
)
from tests.model.test_official import CONFIG
from tests.shared import ORACLE, needs_shared

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def official(model_class, file="pytorch_model.bin", config: ModelConfig = CONFIG):
    model = model_class(InterBertConfig.from_model_config(config)).eval()
    theirs = from_foreign("official", torch.load(ORACLE / file, weights_only=True), config)
    own = {name.removeprefix("interbert.") for name in model.state_dict()}
    model.load_state_dict(
        {f"interbert.{name}": tensor for name, tensor in theirs.items() if name in own}
    )

    return model


def official_inputs():
    """The stored inputs as they are, but with garbage where a region is hidden: hiding it is the
    model's part.
    """
    x = load_file(ORACLE / "inputs.safetensors")
    hidden = x["image_label"] == 1
    inputs = {
        "input_ids": x["input_ids"],
        "attention_mask": x["attention_mask"],
        "token_type_ids": x["token_type_ids"],
        "visual_feats": x["image_feat"].masked_fill(hidden[..., None], 7.0),
        "visual_pos": x["image_loc"],
        "visual_attention_mask": x["image_attention_mask"],
        "region_mask": hidden,
    }

    labels = {
        "labels": x["masked_lm_labels"].masked_fill(x["masked_lm_labels"] == -1, -100),
        "region_targets": x["image_target"],
        "matched_label": x["next_sentence_label"],
    }

    return inputs, labels


@needs_shared
def test_official_outputs():
    model, (inputs, _) = official(InterBertForPreTraining), official_inputs()
    expected = load_file(ORACLE / "outputs.safetensors")
    with torch.no_grad():
        output = model(**inputs)

    tokens = inputs["attention_mask"].bool()
    regions = inputs["visual_attention_mask"].bool()
    image = torch.cat([torch.ones(len(regions), 1, dtype=torch.bool), regions], dim=1)
    for ours, theirs, real in (
        (output.msm_logits, expected["text_scores"], tokens),
        (output.mrm_logits, expected["region_scores"][:, 1:], regions),
        (output.text_hidden, expected["text_hidden"], tokens),
        (output.image_hidden, expected["image_hidden"], image),
    ):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours[real], theirs[real], **TOLERANCE)
        assert not ours[~real].any()

    torch.testing.assert_close(output.itm_logits, expected["itm_scores"], **TOLERANCE)
    torch.testing.assert_close(output.pooled_text, expected["pooled_text"], **TOLERANCE)
    torch.testing.assert_close(output.pooled_image, expected["pooled_image"], **TOLERANCE)
    assert output.loss is None


@needs_shared
def test_official_losses():
    model, (inputs, labels) = official(InterBertForPreTraining), official_inputs()
    expected = load_file(ORACLE / "outputs.safetensors")
    msm = expected["loss_msm"].squeeze()
    itm = expected["loss_itm"].squeeze()
    together = model(**inputs, **labels).loss
    torch.testing.assert_close(
        together, msm + itm + expected["loss_mrm"].squeeze(), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        model(**inputs, labels=labels["labels"]).loss, msm, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        model(**inputs, matched_label=labels["matched_label"]).loss, itm, rtol=1e-4, atol=1e-6
    )

    together.backward()
    gradients = {name.removeprefix("interbert."): p.grad for name, p in model.named_parameters()}
    norms = json.loads((ORACLE / "grad_norms.json").read_text())
    ours = to_official(gradients, CONFIG)

    for name, norm in norms.items():
        if not name.endswith("key.bias"):  # mathematically zero
            torch.testing.assert_close(
                float(ours[name].norm()),
                norm,
                rtol=1e-4,
                atol=1e-7,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@needs_shared
@pytest.mark.parametrize("shared_image", [True, False])
def test_official_choice(shared_image):
    """Two choices for each image: the caption as stored, and another sample's."""
    model, (inputs, _) = (
        official(InterBertForMultipleChoice, "pytorch_model_vl.bin"),
        official_inputs(),
    )
    inputs["visual_feats"] = inputs["visual_feats"].masked_fill(
        inputs.pop("region_mask")[..., None], 0.0
    )
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        inputs[name] = torch.stack([inputs[name], inputs[name].roll(1, dims=0)], dim=1)
    if not shared_image:
        for name in ("visual_feats", "visual_pos", "visual_attention_mask"):
            inputs[name] = torch.stack([inputs[name]] * 2, dim=1)

    output = model(**inputs, labels=torch.tensor([0, 1, 1, 0, 0]))
    expected = load_file(ORACLE / "outputs.safetensors")["choice_logit"].squeeze(1)
    assert output.logits.shape == (5, 2)
    torch.testing.assert_close(output.logits[:, 0], expected, **TOLERANCE)
    assert not torch.allclose(output.logits[:, 0], output.logits[:, 1], atol=1e-3)
    right = output.logits.log_softmax(dim=1)[range(5), [0, 1, 1, 0, 0]]
    torch.testing.assert_close(output.loss, -right.mean())


@pytest.mark.parametrize("mask", [TEXT, TEXT_HOLES], ids=["right-padded", "holes"])
def test_text_alone_is_bert(mask):
    """Also with holes in the mask: a token's position is its column, as in BERT."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 150,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
    }
    theirs = BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=3, intermediate_size=48)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    model = build(InterBertForPreTraining)
    state = from_foreign("bert", theirs.state_dict(), SMALL)
    _, unexpected = model.load_state_dict(
        {f"interbert.{name}": tensor for name, tensor in state.items()}, strict=False
    )
    assert not unexpected

    inputs = text_only(padded_inputs(mask))
    with torch.no_grad():
        ours = model(**inputs)
        expected = theirs(**inputs, output_hidden_states=True)

    real = mask.bool()
    torch.testing.assert_close(
        ours.text_hidden[real], expected.hidden_states[-1][real], **TOLERANCE
    )
    torch.testing.assert_close(ours.msm_logits[real], expected.logits[real], rtol=1e-4, atol=1e-4)
    assert ours.image_hidden is None
    assert ours.pooled_image is None
    assert ours.mrm_logits is None
    assert ours.itm_logits is None
