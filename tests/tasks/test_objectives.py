"""Test the objectives of pretraining: losses and gradients against twins in float64 on ragged
batches, the same on every layout.
"""

import numpy as np
import pytest
import torch

from megatron_interbert.config.objectives import OBJECTIVES
from megatron_interbert.data.packing import to_batch
from megatron_interbert.model.partition import partition_dimension
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.region_losses import hard_label_losses
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from tests.dist import run_on_ranks
from tests.tasks.objective_twins import SAMPLES, make_model, samples_of, settings, twin

WAYS = [
    ("msm", {}),
    ("mrm", {}),
    ("itm", {}),
    ("mrc", {}),
    ("mrc", {"mrc_confidence": True}),
    ("attributes", {}),
    ("mrfr", {}),
    ("mrfr", {"mrfr_reduction": "sum", "mrfr_normalise": True}),
    ("wra", {}),
    ("vqa", {}),
]


@pytest.mark.parametrize(("objective", "more"), WAYS)
def test_losses_and_gradients_against_float64(asked_store, objective, more):
    config = settings(asked_store, objective, **more)
    batch = samples_of(config)[list(range(SAMPLES))]
    task = PretrainingTask(config)
    model = make_model(config)
    loss, report = task.loss(model(batch), batch, task.count_targets(batch))
    expected = twin(objective, config, model(batch, everything=objective == "msm"), batch)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)

    parameters = list(model.parameters())
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    scale = max(g.abs().max() for g in theirs if g is not None)
    for one, other in zip(ours, theirs, strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            torch.testing.assert_close(one / scale, other / scale, atol=2e-5, rtol=1e-3)

    values = task.metrics(report)
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
    factor = 0.1 if objective == "wra" else 1.0
    assert factor * values[f"{objective}_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_losses_add_up_by_their_weights(asked_store):
    every = ",".join(OBJECTIVES)
    config = settings(asked_store, every, objective_weights="mrfr:0.5,wra:2,itm:3")
    batch = samples_of(config)[list(range(SAMPLES))]
    task = PretrainingTask(config)
    model = make_model(config)
    output = model(batch)
    with_words = model(batch, everything=True)
    loss, _ = task.loss(output, batch, task.count_targets(batch))
    weights = {"msm": 1, "mrm": 1, "mrc": 1, "attributes": 1, "mrfr": 0.5, "itm": 3, "wra": 20}
    weights["vqa"] = 1
    expected = sum(
        w * twin(name, config, with_words if name == "msm" else output, batch).item()
        for name, w in weights.items()
    )
    assert loss.item() == pytest.approx(expected, rel=2e-5)
    line = task.line(task.metrics(task.loss(output, batch, task.count_targets(batch))[1]))
    assert "mrfr" in line
    assert line.count("%") == 6, "features and alignment have no accuracy"


def share_on_ranks(asked_store, objectives, tensor, path):
    """Compare a rank's share of a step, summed over ranks, with the whole step in one process."""
    state = ParallelState(tensor)
    config = settings(asked_store, objectives)
    samples = samples_of(config)
    task = PretrainingTask(config)
    model = make_model(config, state)
    mine = list(range(SAMPLES))[state.data_rank :: state.data_size]
    cuts = [mine[:5], mine[5:6], mine[6:]]
    batches = [to_batch(samples.fields([samples.order.at(p) for p in part])) for part in cuts]
    totals = torch.stack([task.count_targets(batch) for batch in batches]).sum(0)
    totals = state.sum_over_data(totals)
    loss = sum(task.loss(model(batch), batch, totals)[0] for batch in batches)
    loss.backward()
    whole = torch.load(path, weights_only=True)
    assert state.sum_over_data(loss.detach().clone()).item() == pytest.approx(
        whole["loss"], rel=1e-5
    )
    for name, parameter in model.named_parameters():
        if name not in whole:
            continue  # divided among tensor ranks
        gradient = parameter.grad.clone()
        found = state.sum_over_data(gradient)
        scale = whole[name].abs().max().clamp(min=1e-6)
        torch.testing.assert_close(found / scale, whole[name] / scale, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("ranks", "tensor"), [(2, 1), (2, 2)])
def test_losses_do_not_depend_on_the_layout(asked_store, tmp_path, ranks, tensor):
    every = ",".join(OBJECTIVES)
    config = settings(asked_store, every)
    batch = samples_of(config)[list(range(SAMPLES))]
    task = PretrainingTask(config)
    model = make_model(config)
    loss, _ = task.loss(model(batch), batch, task.count_targets(batch))
    loss.backward()
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and (tensor == 1 or partition_dimension(name) is None)
    }
    assert any("mrfr_head" in name for name in found)
    assert any("attribute_head" in name for name in found)
    assert any("task_heads" in name for name in found)
    torch.save({"loss": loss.item(), **found}, tmp_path / "whole.pt")
    run_on_ranks(ranks, share_on_ranks, asked_store, every, tensor, str(tmp_path / "whole.pt"))


@pytest.mark.parametrize(
    ("ids", "probs", "background", "label"),
    [
        ([0, 5, 3], [0.6, 0.3, 0.1], 0, 5),
        ([0, 1, 2], [1.0, 0.0, 0.0], 0, 0),  # filled up with classes that nobody found
        ([0, 1, 2], [1.0, 0.0, 0.0], None, 0),
        ([0, 5, 3], [0.6, 0.3, 0.1], None, 0),
        ([4, 5, 3], [0.6, 0.3, 0.1], 4, 5),
        ([7, 0, 1], [0.9, 0.0, 0.0], 0, 7),
    ],
)
def test_the_likeliest_class_that_is_an_object(ids, probs, background, label):
    given = torch.tensor([ids]), torch.tensor([probs])
    losses, labels = hard_label_losses(torch.zeros(1, 8), *given, background, confidence=True)
    assert labels.tolist() == [label]
    expected = np.log(8) * probs[ids.index(label)]
    assert losses.item() == pytest.approx(expected, rel=1e-5)
