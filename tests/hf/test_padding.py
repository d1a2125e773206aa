"""Padded inputs: the same packed batch as the data loader's, padding without influence, clear
errors.
"""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_interbert.data.packing import Example, pack
from megatron_interbert.errors import UsageError
from megatron_interbert.hf import (
    InterBertForImageTextRetrieval,
    InterBertForMultipleChoice,
    InterBertForPreTraining,
    InterBertForSequenceClassification,
    InterBertModel,
)
from megatron_interbert.hf.padding import PaddedInputs, pack_padded, to_padded
from tests.hf.small import (
    REGION_HOLES,
    REGIONS,
    SMALL,
    TEXT,
    TEXT_HOLES,
    build,
    padded_inputs,
    pretraining_labels,
    text_only,
)

LAID_OUT_ELSEWHERE = (
    "hidden_regions",
    "msm_positions",
    "msm_labels",
    "mrm_positions",
    "mismatched",
    "sample_ids",
)


@pytest.mark.parametrize("pictured", [True, False])
def test_same_batch_as_the_loader_packs(pictured):
    inputs = padded_inputs()
    batch, slots = pack_padded(PaddedInputs(**inputs if pictured else text_only(inputs)), SMALL)
    examples = []

    for i in range(len(TEXT)):
        tokens = TEXT[i].bool()
        regions = REGIONS[i].bool()
        image = {
            "features": inputs["visual_feats"][i][regions].numpy(),
            "locations": inputs["visual_pos"][i][regions].numpy(),
        }
        ids, types = (inputs[name][i][tokens].numpy() for name in ("input_ids", "token_type_ids"))
        examples.append(Example(ids, types, **(image if pictured else {})))

    expected = pack(examples, SMALL.feature_dim)
    for field in dataclasses.fields(expected):
        ours = getattr(batch, field.name)
        theirs = getattr(expected, field.name)

        if field.name == "features":
            assert torch.equal(ours.half(), theirs)
        elif isinstance(theirs, int | str):
            assert ours == theirs, field.name
        elif field.name not in LAID_OUT_ELSEWHERE and not field.name.startswith("mrm_class"):
            assert ours.dtype == theirs.dtype, field.name
            assert torch.equal(ours, theirs), field.name

    assert torch.equal(slots.text, TEXT.flatten().nonzero().squeeze(1))
    assert len(slots.image) == (len(slots.regions) + len(TEXT) if pictured else 0)


def test_there_and_back():
    rows = torch.arange(12.0).view(6, 2)
    padded = to_padded(rows, torch.tensor([0, 1, 3, 5, 6, 8]), 3, 3)
    assert padded.shape == (3, 3, 2)
    assert torch.equal(padded[1, 2], rows[3])
    assert not padded[0, 2].any()


@pytest.mark.parametrize(
    "masks", [(TEXT, REGIONS), (TEXT_HOLES, REGION_HOLES)], ids=["right-padded", "holes"]
)
def test_padding_has_no_influence_bit_for_bit(masks):
    """Garbage, NaN included, in padded and hidden places changes neither outputs nor gradients."""
    text, regions = masks
    model = build(InterBertForPreTraining)
    answers = []

    for garbage in (False, True):
        inputs = padded_inputs(text, regions)
        labels = pretraining_labels()

        if garbage:
            nothing = (regions == 0)[..., None]
            hidden = labels["region_mask"][..., None]
            inputs["input_ids"] = inputs["input_ids"].where(text == 1, 10**6)
            inputs["token_type_ids"] = inputs["token_type_ids"].where(text == 1, -7)
            inputs["visual_feats"] = inputs["visual_feats"].masked_fill(nothing | hidden, torch.nan)
            inputs["visual_pos"] = inputs["visual_pos"].masked_fill(nothing, torch.inf)
            labels["labels"] = labels["labels"].where(text == 1, 10**6)
            unused = nothing | ~hidden | (labels["matched_label"] == 1)[:, None, None]
            labels["region_targets"] = labels["region_targets"].masked_fill(unused, torch.nan)
            labels["region_mask"] = labels["region_mask"] | (regions == 0)

        output = model(**inputs, **labels)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        answers.append([*output.to_tuple(), *gradients])

    assert len(answers[0]) == 8 + len(list(model.parameters()))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*answers, strict=True))


def test_each_sample_as_if_it_were_alone():
    """Without padding, with the right positions, the hidden states are those of the padded
    batch.
    """
    model = build(InterBertModel)
    inputs = padded_inputs()

    with torch.no_grad():
        together = model(**inputs)
        for i in range(len(TEXT)):
            tokens = int(TEXT[i].sum())
            regions = int(REGIONS[i].sum())
            alone = {
                n: v[i : i + 1, : regions if n.startswith("visual") else tokens]
                for n, v in inputs.items()
            }
            # all real by default
            single = model(
                **{name: value for name, value in alone.items() if not name.endswith("mask")}
            )
            torch.testing.assert_close(
                single.text_hidden[0], together.text_hidden[i, :tokens], rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                single.image_hidden[0],
                together.image_hidden[i, : 1 + regions],
                rtol=1e-4,
                atol=1e-5,
            )
            torch.testing.assert_close(
                single.pooled_image[0], together.pooled_image[i], rtol=1e-4, atol=1e-5
            )


def test_gradient_reaches_what_is_real_and_nothing_else():
    model = build(InterBertForPreTraining)
    inputs = padded_inputs()
    labels = pretraining_labels()
    inputs["visual_feats"].requires_grad_()
    # a word that only pads
    inputs["input_ids"] = inputs["input_ids"].clamp(max=140).where(TEXT == 1, 148)
    model(
        **inputs, **labels | {"labels": labels["labels"].clamp(max=140)}
    ).itm_logits.sum().backward()
    reached = inputs["visual_feats"].grad.abs().sum(dim=2) > 0
    assert torch.equal(reached, (REGIONS == 1) & ~labels["region_mask"])
    words = model.interbert.text_embedding.word.weight.grad.abs().sum(dim=1) > 0
    assert set(words.nonzero().squeeze(1).tolist()) == set(inputs["input_ids"][TEXT == 1].tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_features_of_any_type(dtype):
    model = build(InterBertModel)
    inputs = padded_inputs()
    inputs["visual_feats"] = inputs["visual_feats"].half()
    expected = model(**inputs).pooled_image
    inputs["visual_feats"] = inputs["visual_feats"].to(dtype)
    inputs["attention_mask"] = TEXT.float()
    inputs["visual_attention_mask"] = REGIONS.bool()
    assert torch.equal(model(**inputs).pooled_image, expected)


WRONG = {
    "no text": ({"input_ids": None}, "input_ids has shape None"),
    "one axis": (
        {"input_ids": torch.zeros(7, dtype=torch.long)},
        r"input_ids has shape \[7\], expected \[samples, tokens\]",
    ),
    "too long": (
        {"input_ids": torch.zeros(3, 41, dtype=torch.long)},
        "input_ids has 41 columns, the model has only 40 positions",
    ),
    "mask shape": (
        {"attention_mask": torch.ones(3, 6)},
        r"attention_mask has shape \[3, 6\], expected \[3, 7\]",
    ),
    "types shape": (
        {"token_type_ids": torch.ones(2, 7)},
        r"token_type_ids has shape \[2, 7\], expected \[3, 7\]",
    ),
    "no places": ({"visual_pos": None}, "visual_feats is given without visual_pos"),
    "no features": ({"visual_feats": None}, "visual_pos is given without visual_feats"),
    "places shape": (
        {"visual_pos": torch.ones(3, 5, 4)},
        r"visual_pos has shape \[3, 5, 4\], expected \[3, 5, 5\]",
    ),
    "width": (
        {"visual_feats": torch.ones(3, 5, 21)},
        r"visual_feats has shape \[3, 5, 21\], expected \[3, 5, 20\]",
    ),
    "flat features": (
        {"visual_feats": torch.ones(3, 20)},
        r"visual_feats has shape \[3, 20\], expected \[3, regions, 20\]",
    ),
    "samples": (
        {"visual_feats": torch.ones(2, 5, 20)},
        r"visual_feats has shape \[2, 5, 20\], expected \[3, 5, 20\]",
    ),
    "empty text": (
        {"attention_mask": TEXT * torch.tensor([[1], [0], [1]])},
        "attention_mask: sample 1 has no real token",
    ),
    "no region": (
        {"visual_attention_mask": REGIONS * torch.tensor([[1], [1], [0]])},
        "sample 2 has no real region",
    ),
    "list": ({"input_ids": [[1, 2, 3]]}, "input_ids is of type list, expected a tensor"),
    "array": (
        {"visual_feats": np.ones((3, 5, 20))},
        "visual_feats is of type ndarray, expected a tensor",
    ),
    "fractions": (
        {"input_ids": torch.ones(3, 7)},
        "input_ids has type torch.float32, expected integers",
    ),
    "beyond the words": (
        {"input_ids": torch.full((3, 7), 10**6)},
        "input_ids holds 1000000, expected 0 to 149",
    ),
    "padded vocabulary": (
        {"input_ids": torch.full((3, 7), 150)},
        "input_ids holds 150, expected 0 to 149",
    ),
    "negative": ({"input_ids": torch.full((3, 7), -1)}, "input_ids holds -1, expected 0 to 149"),
    "types": ({"token_type_ids": torch.full((3, 7), 2)}, "token_type_ids holds 2, expected 0 to 1"),
    "no columns": (
        {
            "visual_feats": torch.ones(3, 0, 20),
            "visual_pos": torch.ones(3, 0, 5),
            "visual_attention_mask": None,
        },
        "sample 0",
    ),
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_inputs_are_named(change):
    values, message = WRONG[change]
    with pytest.raises(UsageError, match=message) as caught:
        build(InterBertModel)(**{**padded_inputs(), **values})
    assert "\n" not in str(caught.value)


TWO = torch.zeros(3, 2, 7, dtype=torch.long)  # two choices for each of three images
WRONG_CHOICES = {
    "no text": (
        {"input_ids": None},
        "input_ids has shape None, expected [samples, choices, tokens]",
    ),
    "one text": (
        {"input_ids": TWO[:, 0]},
        "input_ids has shape [3, 7], expected [samples, choices, tokens]",
    ),
    "list": ({"input_ids": TWO.tolist()}, "input_ids is of type list, expected a tensor"),
    "one mask": ({"attention_mask": TEXT}, "attention_mask has shape [3, 7], expected [3, 2, 7]"),
    "types": (
        {"token_type_ids": TWO[:, :1]},
        "token_type_ids has shape [3, 1, 7], expected [3, 2, 7]",
    ),
    "flat image": (
        {"visual_feats": torch.ones(3, 20)},
        "visual_feats has shape [3, 20], expected [3, regions, 20]",
    ),
    "width": (
        {"visual_feats": torch.ones(3, 2, 5, 21)},
        "visual_feats has shape [3, 2, 5, 21], expected [3, 2, 5, 20]",
    ),
    "samples": (
        {"visual_feats": torch.ones(2, 5, 20)},
        "visual_feats has shape [2, 5, 20], expected [3, 5, 20]",
    ),
    "choices": (
        {"visual_feats": torch.ones(3, 3, 5, 20)},
        "visual_feats has shape [3, 3, 5, 20], expected [3, 2, 5, 20]",
    ),
    "places of one": (
        {"visual_feats": torch.ones(3, 2, 5, 20)},
        "visual_pos has shape [3, 5, 5], expected [3, 2, 5, 5]",
    ),
    "places of each": (
        {"visual_pos": torch.ones(3, 2, 5, 5)},
        "visual_pos has shape [3, 2, 5, 5], expected [3, 5, 5]",
    ),
    "no places": (
        {"visual_pos": None},
        "visual_feats is given without visual_pos [samples, regions, 5], the regions' positions",
    ),
}


@pytest.mark.parametrize("change", WRONG_CHOICES)
def test_wrong_choices_are_named_in_the_callers_shapes(change):
    values, message = WRONG_CHOICES[change]
    inputs = {**padded_inputs(), "input_ids": TWO, "attention_mask": TWO + 1, "token_type_ids": TWO}
    build(InterBertForMultipleChoice)(**inputs)
    with pytest.raises(UsageError) as caught:
        build(InterBertForMultipleChoice)(**{**inputs, **values})
    assert str(caught.value) == message


WRONG_LABELS = {
    "labels": (
        torch.zeros(3, 6, dtype=torch.long),
        r"labels has shape \[3, 6\], expected \[3, 7\]",
    ),
    "matched_label": (
        torch.zeros(2, dtype=torch.long),
        r"matched_label has shape \[2\], expected \[3\]",
    ),
    "region_targets": (
        torch.zeros(3, 5, 8),
        r"region_targets has shape \[3, 5, 8\], expected \[3, 5\] or \[3, 5, 9\]",
    ),
    "region_mask": (torch.zeros(3, 4), r"region_mask has shape \[3, 4\], expected \[3, 5\]"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_wrong_labels_are_named(name):
    values, message = WRONG_LABELS[name]
    with pytest.raises(UsageError, match=message):
        build(InterBertForPreTraining)(**padded_inputs(), **{**pretraining_labels(), name: values})


def test_labels_that_lack_their_inputs():
    model = build(InterBertForPreTraining)
    inputs = padded_inputs()
    labels = pretraining_labels()
    with pytest.raises(UsageError, match="region_targets is given without region_mask"):
        model(**inputs, region_targets=labels["region_targets"])
    with pytest.raises(UsageError, match="region_mask is given without visual_feats"):
        model(**text_only(inputs), region_mask=labels["region_mask"])
    with pytest.raises(UsageError, match="matched_label needs visual_feats"):
        model(**text_only(inputs), matched_label=labels["matched_label"])
    with pytest.raises(
        UsageError, match="InterBertForImageTextRetrieval: this head needs visual_feats"
    ):
        build(InterBertForImageTextRetrieval)(**text_only(inputs))

    with pytest.raises(UsageError, match=r"expected \[samples, choices, tokens\]"):
        build(InterBertForMultipleChoice)(**inputs)
    with pytest.raises(UsageError, match=r"labels has shape \[2\], expected \[3\]"):
        build(InterBertForImageTextRetrieval)(**inputs, labels=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "model_class",
    [InterBertModel, InterBertForImageTextRetrieval, InterBertForSequenceClassification],
)
def test_tuples_for_those_who_ask(model_class):
    model = build(model_class)
    inputs = padded_inputs()
    named = model(**inputs)
    plain = model(**inputs, return_dict=False)
    assert isinstance(plain, tuple)
    assert all(torch.equal(a, b) for a, b in zip(named.to_tuple(), plain, strict=True))


def test_shapes_of_the_largest_output():
    output = build(InterBertForPreTraining)(**padded_inputs(), **pretraining_labels())
    shapes = {name: tuple(value.shape) for name, value in output.items()}
    assert shapes == {
        "loss": (),
        "msm_logits": (3, 7, 150),
        "mrm_logits": (3, 5, 9),
        "itm_logits": (3, 2),
        "text_hidden": (3, 7, 32),
        "image_hidden": (3, 6, 32),
        "pooled_text": (3, 24),
        "pooled_image": (3, 24),
    }
    assert np.isfinite(output.msm_logits.detach().numpy()).all()
