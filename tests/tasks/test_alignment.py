"""Test the alignment of words and regions: plans, their costs, the steps in which it is trained."""

import itertools

import pytest
import torch

from megatron_interbert.data.packing import to_batch
from megatron_interbert.tasks.pretraining.alignment import (
    alignment_distances,
    as_block,
    transport_plan,
)
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from tests.tasks.objective_twins import (
    SAMPLES,
    distance_of,
    make_model,
    samples_of,
    settings,
    twin,
)


def test_a_plan_never_couples_two_samples(asked_store):
    config = settings(asked_store, "itm,wra")
    batch = samples_of(config)[list(range(SAMPLES))]
    random = torch.Generator().manual_seed(0)
    text = torch.randn(len(batch.token_ids), 8, generator=random, requires_grad=True)
    image = torch.randn(len(batch.locations), 8, generator=random, requires_grad=True)
    distances = alignment_distances(text, image, batch)

    for sample in range(SAMPLES):
        words = slice(int(batch.text_offsets[sample]), int(batch.text_offsets[sample + 1]))
        regions = slice(int(batch.image_offsets[sample]) + 1, int(batch.image_offsets[sample + 1]))
        alone = distance_of(text[words].double(), image[regions].double())
        assert distances[sample].item() == pytest.approx(alone.item(), abs=1e-6)
        of_text, of_image = torch.autograd.grad(distances[sample], (text, image), retain_graph=True)
        for gradient, own in ((of_text, words), (of_image, regions)):
            outside = torch.ones(len(gradient), dtype=torch.bool)
            outside[own] = False
            assert not gradient[outside].any()
            assert gradient[own].any(dim=1).all()

        assert not of_image[int(batch.image_offsets[sample])].any(), "[IMG] is no region"


def test_plans_keep_masses_and_reach_the_least_cost():
    random = torch.Generator().manual_seed(1)
    cost = torch.rand(4, 5, 5, generator=random)
    taken = torch.ones(4, 5, dtype=torch.bool)
    plan = transport_plan(cost, taken, taken)
    torch.testing.assert_close(plan.sum(dim=2), torch.full((4, 5), 0.2), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum(dim=1), torch.full((4, 5), 0.2), atol=1e-4, rtol=0)
    for sample in range(4):
        best = min(
            sum(cost[sample, row, column].item() for row, column in enumerate(order)) / 5
            for order in itertools.permutations(range(5))
        )
        assert (plan[sample] * cost[sample]).sum().item() == pytest.approx(best, abs=2e-3)

    fewer = taken.clone()
    fewer[:, 3:] = False
    assert not transport_plan(cost, taken, fewer)[:, :, 3:].any()


def test_blocks_hold_each_row_once(asked_store):
    batch = samples_of(settings(asked_store, "itm"))[list(range(SAMPLES))]
    rows = torch.arange(len(batch.locations)).float()[:, None].expand(-1, 3) + 1
    values, taken = as_block(rows, batch.region_rows, batch.image_offsets, 1, batch.max_image - 1)
    assert taken.sum().item() == len(batch.region_rows)
    assert taken.sum(dim=1).tolist() == batch.region_counts.tolist()
    assert values.norm(dim=2)[taken].allclose(torch.ones(1))


def test_alignment_joins_the_steps_of_matching(asked_store):
    config = settings(asked_store, "itm,msm,wra", objective_mix="itm:1,msm:1")
    data = samples_of(config)
    task = PretrainingTask(config)
    model = make_model(config)
    for step in range(20):
        start = step * SAMPLES
        pairs = data.order.pairs(range(start, start + SAMPLES), start)
        batch = to_batch(data.fields(pairs))
        counts = dict(zip(task.names, task.count_targets(batch).tolist(), strict=True))
        assert counts["wra"] == counts["itm"] == (SAMPLES if batch.head == "itm" else 0)
        loss, _ = task.loss(model(batch), batch, task.count_targets(batch))
        output = model(batch, everything=batch.head == "msm")
        expected = twin(batch.head, config, output, batch)
        if batch.head == "itm":
            expected = expected + twin("wra", config, model(batch), batch)
        assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
