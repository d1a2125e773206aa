"""Training through the doors: losses, dropout by torch's seed, recomputation, classification and
choice.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from megatron_interbert.errors import UsageError
from megatron_interbert.hf import (
    InterBertForImageTextRetrieval,
    InterBertForMultipleChoice,
    InterBertForPreTraining,
    InterBertForSequenceClassification,
)
from megatron_interbert.model.transformer import TransformerLayer
from tests.hf.small import REGIONS, TEXT, build, padded_inputs, pretraining_labels, text_only


def gradients(model, seed=5, **inputs):
    torch.manual_seed(seed)
    model.zero_grad()
    model(**inputs).loss.backward()

    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("soft", [True, False])
def test_loss_from_the_logits_by_hand(soft):
    model = build(InterBertForPreTraining)
    inputs = padded_inputs()
    labels = pretraining_labels(soft=soft)
    output = model(**inputs, **labels)
    words = (TEXT == 1) & (labels["labels"] != -100)
    msm = F.cross_entropy(output.msm_logits[words], labels["labels"][words])
    regions = (REGIONS == 1) & labels["region_mask"] & (labels["matched_label"] == 0)[:, None]
    target = (
        labels["region_targets"][regions]
        if soft
        else F.one_hot(labels["region_targets"][regions], 9).float()
    )
    mrm = F.kl_div(output.mrm_logits[regions].log_softmax(dim=-1), target, reduction="batchmean")
    itm = F.cross_entropy(output.itm_logits, labels["matched_label"])
    assert regions.sum() == 3
    torch.testing.assert_close(output.loss, msm + mrm + itm)
    without = model(
        **inputs, **{name: value for name, value in labels.items() if name != "matched_label"}
    ).loss
    regions = (REGIONS == 1) & labels["region_mask"]  # not told which pairs match, all count
    assert regions.sum() == 5
    target = (
        labels["region_targets"][regions]
        if soft
        else F.one_hot(labels["region_targets"][regions], 9).float()
    )
    torch.testing.assert_close(
        without - msm,
        F.kl_div(output.mrm_logits[regions].log_softmax(dim=-1), target, reduction="batchmean"),
    )


def test_no_targets_give_no_loss_and_no_nan():
    model = build(InterBertForPreTraining)
    inputs = padded_inputs()
    labels = {
        "labels": torch.full_like(TEXT, -100),
        "region_mask": REGIONS == 1,
        "region_targets": torch.full_like(REGIONS, -100),
    }
    found = gradients(model, **inputs, **labels)
    assert model(**inputs, **labels).loss == 0
    assert not any(gradient.any() for gradient in found.values())


def test_dropout_follows_the_seed():
    model = build(InterBertForPreTraining)
    inputs = {**padded_inputs(), **pretraining_labels()}
    still = gradients(model, 1, **inputs)
    assert same(still, gradients(model, 2, **inputs))
    model.train()
    first = gradients(model, 1, **inputs)
    # attention dropout too: it has no stream of its own here
    assert same(first, gradients(model, 1, **inputs))
    assert same(first, gradients(copy.deepcopy(model), 1, **inputs))
    assert not same(first, gradients(model, 2, **inputs))
    assert not same(first, still)


@pytest.mark.parametrize(
    "dropout",
    ["hidden_dropout", "attention_dropout", "image_hidden_dropout", "image_attention_dropout"],
)
def test_every_dropout_is_at_work(dropout):
    names = (
        "hidden_dropout",
        "attention_dropout",
        "image_hidden_dropout",
        "image_attention_dropout",
    )
    model = build(InterBertForImageTextRetrieval)
    values = {**dict.fromkeys(names, 0.0), dropout: 0.3}
    for name, value in values.items():
        setattr(model.config, name, value)

    model = InterBertForImageTextRetrieval(model.config).train()
    inputs = padded_inputs()
    scores = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        scores.append(model(**inputs).scores)

    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


# its new name is younger than 5.3
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*is deprecated:FutureWarning")
def test_recomputation_gives_the_same_gradients():
    model = build(InterBertForPreTraining).train()
    inputs = {**padded_inputs(), **pretraining_labels()}
    calls = []
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            module.register_forward_pre_hook(lambda *_: calls.append(1))

    layers = 2 + 1 + 2
    plain = gradients(model, **inputs)
    assert len(calls) == layers
    model.gradient_checkpointing_enable()
    assert model.gradient_checkpointing
    calls.clear()
    assert same(plain, gradients(model, **inputs))
    assert len(calls) == 2 * layers
    model.gradient_checkpointing_disable()
    calls.clear()
    assert same(plain, gradients(model, **inputs))
    assert len(calls) == layers
    with pytest.raises(UsageError, match="every_n_layers is 2"):
        model._set_gradient_checkpointing(enable=True, every_n_layers=2)


def test_a_few_steps_learn_a_batch():
    model = build(InterBertForPreTraining).train()
    inputs = {**padded_inputs(), **pretraining_labels()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    torch.manual_seed(0)

    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0] / 2


def test_retrieval_scores_and_loss():
    model = build(InterBertForImageTextRetrieval)
    labels = torch.tensor([0, 1, 1])
    output = model(**padded_inputs(), labels=labels)
    assert torch.equal(output.scores, output.itm_logits[:, 0] - output.itm_logits[:, 1])
    chance_of_matched = output.scores.sigmoid()
    torch.testing.assert_close(output.loss, F.binary_cross_entropy(chance_of_matched, 1.0 - labels))
    assert model(**padded_inputs()).loss is None


def test_choices_one_by_one():
    """Four choices for each image: the logits are those of a single choice, whichever way the image
    is given.
    """
    model = build(InterBertForMultipleChoice)
    inputs = padded_inputs()
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        inputs[name] = torch.stack([inputs[name].roll(shift, dims=0) for shift in range(4)], dim=1)

    shared = model(**inputs, labels=torch.tensor([3, 0, 1]))
    own = {
        n: v[:, None].expand(-1, 4, *v.shape[1:]) if n.startswith("visual") else v
        for n, v in inputs.items()
    }
    assert torch.equal(shared.logits, model(**own).logits)
    assert shared.logits.shape == (3, 4)

    for choice in range(4):
        single = {
            name: value if name.startswith("visual") else value[:, choice : choice + 1]
            for name, value in inputs.items()
        }
        torch.testing.assert_close(
            model(**single).logits[:, 0], shared.logits[:, choice], rtol=1e-4, atol=1e-5
        )

    torch.testing.assert_close(shared.loss, F.cross_entropy(shared.logits, torch.tensor([3, 0, 1])))
    other = dict(own, visual_feats=own["visual_feats"] + torch.arange(4.0)[None, :, None, None])
    assert not torch.allclose(model(**other).logits[:, 1:], shared.logits[:, 1:], atol=1e-3)


def test_classification_of_text_alone_and_with_images():
    model = build(InterBertForSequenceClassification, num_labels=4)
    inputs = padded_inputs()
    core = model.interbert
    states = []
    handle = core.register_forward_hook(lambda module, arguments, output: states.append(output))
    with_images = model(**inputs).logits
    alone = model(**text_only(inputs)).logits
    handle.remove()
    torch.testing.assert_close(
        with_images, model.classifier(states[0].pooled_text * states[0].pooled_image)
    )
    torch.testing.assert_close(alone, model.classifier(states[1].pooled_text))
    assert states[1].pooled_image is None


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem", "loss"),
    [
        (1, torch.tensor([0.5, 2.0, -1.0]), "regression", lambda x, y: F.mse_loss(x.squeeze(1), y)),
        (4, torch.tensor([0, 3, 2]), "single_label_classification", F.cross_entropy),
        (4, torch.eye(4)[:3], "multi_label_classification", F.binary_cross_entropy_with_logits),
    ],
)
def test_problem_types(num_labels, labels, problem, loss):
    model = build(InterBertForSequenceClassification, num_labels=num_labels)
    output = model(**text_only(padded_inputs()), labels=labels)
    assert output.logits.shape == (3, num_labels)
    assert model.config.problem_type == problem
    torch.testing.assert_close(output.loss, loss(output.logits, labels))
