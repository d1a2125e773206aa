"""Test pretrainings in which each step has one objective."""

import pytest
import torch

from megatron_interbert.data.packing import to_batch
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from tests.tasks.objective_twins import (
    SAMPLES,
    make_model,
    samples_of,
    settings,
    twin,
)


def test_each_step_of_a_mix_has_one_objective(asked_store):
    mix = "itm:2,msm:2,mrfr:1,mrm:1"
    config = settings(asked_store, "itm,msm,mrfr,mrm", objective_mix=mix)
    data = samples_of(config)
    task = PretrainingTask(config)
    model = make_model(config)
    seen = {}
    drawn = []

    for step in range(300):
        start = step * SAMPLES
        positions = range(start, start + SAMPLES)
        if step < 40:
            batch = to_batch(data.fields(data.order.pairs(positions, start)))
            seen.setdefault(batch.head, batch)
            part = to_batch(data.fields(data.order.pairs(positions[3:5], start)))
            assert part.head == batch.head, "every micro-batch of the step has the same"
        drawn.append(data._objective_of(start))

    for name, share in (("itm", 1 / 3), ("msm", 1 / 3), ("mrfr", 1 / 6), ("mrm", 1 / 6)):
        assert drawn.count(name) / 300 == pytest.approx(share, abs=0.09)

    for name, batch in seen.items():
        assert bool(batch.mismatched.any()) == (name == "itm")
        assert bool(len(batch.msm_labels)) == (name == "msm")
        assert bool(len(batch.hidden_regions)) == (name in ("mrfr", "mrm"))
        counts = dict(zip(task.names, task.count_targets(batch).tolist(), strict=True))
        assert {n for n, count in counts.items() if count} == {name}
        loss, report = task.loss(model(batch), batch, task.count_targets(batch))
        expected = twin(name, config, model(batch, everything=name == "msm"), batch)
        assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
        others = [row for n, row in zip(task.names, report, strict=True) if n != name]
        assert not torch.stack(others).any()
        model.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.mrfr_head.parameters())


def test_a_step_of_a_mix_reports_its_own_objective(asked_store):
    config = settings(asked_store, "msm,mrm,itm", objective_mix="msm:1,mrm:1,itm:1")
    samples = samples_of(config)
    task = PretrainingTask(config)
    model = make_model(config)
    seen = set()

    for step in range(12):
        positions = [step * SAMPLES + place for place in range(SAMPLES)]
        batch = to_batch(samples.fields(samples.order.pairs(positions, step * SAMPLES)))
        loss, report = task.loss(model(batch), batch, task.count_targets(batch))
        values = task.metrics(report)
        losses = [name for name in values if name.endswith("_loss")]
        assert losses == [f"{batch.head}_loss"]
        assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert task.line(values).count("|") == 1
        seen.add(batch.head)

    assert seen == {"msm", "mrm", "itm"}
