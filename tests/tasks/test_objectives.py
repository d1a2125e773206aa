"""Test the objectives of pretraining: losses and gradients against twins in float64 on ragged
batches, the same on every layout; plans of alignment; steps of one objective.
"""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_interbert.config.objectives import OBJECTIVES
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import partition_dimension
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.alignment import (
    alignment_distances,
    as_block,
    transport_plan,
)
from megatron_interbert.tasks.pretraining.job import heads_of, model_options
from megatron_interbert.tasks.pretraining.questions import read_questions
from megatron_interbert.tasks.pretraining.region_losses import hard_label_losses
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from tests.corpus import write_store
from tests.dist import run_on_ranks
from tests.tasks.test_retrieval import sizes

SAMPLES = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Write a store and questions about some of its images."""
    return write_asked(tmp_path_factory.mktemp("objectives"))


def write_asked(folder):
    """Write a store whose images have 2 to 9 regions, and questions about some of them."""
    asked = [
        {
            "id": number,
            "qas": [
                {
                    "qa_id": 10 * number + place,
                    "image_id": f"image-{number}",
                    "question": text,
                    "answer": ("red", "blue", "two", "a dog")[(number + place) % 4],
                }
                for place, text in enumerate(("red cat", "the old dog runs", "house"))
            ],
        }
        for number in range(0, 24, 2)
    ]
    (folder / "questions.json").write_text(json.dumps(asked))
    flags = {"questions": str(folder / "questions.json"), "min_occurrences": 1}
    (folder / "questions.yaml").write_text(json.dumps({"vgqa": flags}))
    return write_store(folder / "store", images=24, num_attributes=7)


def settings(store, objectives, **more):
    """Return the settings of a pretraining with some objectives."""
    if "vqa" in objectives:
        more["questions"] = str(store.parent / "questions.yaml")

    config = RunConfig(
        data_path=str(store),
        objectives=objectives,
        data_partitions=2,
        micro_batch_size=SAMPLES,
        global_batch_size=SAMPLES,
        **more,
    )
    config.given |= {"objectives", "data_partitions"}
    config.check()
    return config


def samples_of(config):
    """Open the training set of a configuration."""
    tokenizer = CaptionTokenizer(f"{config.data_path}/vocab.txt")
    asked = read_questions(config, ParallelState())
    questions = asked.questions if asked else None
    return PretrainingSet(Corpus([config.data_path]), tokenizer, config, questions)


def make_model(config, state=None):
    """Build a small model with the heads that the objectives need."""
    state = state or ParallelState()
    small = sizes()
    options = model_options(config, 7, read_questions(config, ParallelState()))
    model = InterBert(small, heads_of(config, True), state=state, **options)
    initialise(model, small, 0, state)
    return model.eval()


def distance_of(words, regions):
    """Compute the transport distance of one sample in float64, its plan by 50 steps of IPOT."""
    cost = 1 - F.normalize(words, dim=1) @ F.normalize(regions, dim=1).T
    count, others = cost.shape
    plan = torch.ones_like(cost)
    nearness = torch.exp(-cost.detach() / 0.5)
    left = torch.ones(count, dtype=cost.dtype) / count
    for _ in range(50):
        kernel = nearness * plan
        right = 1 / (others * (kernel.T @ left))
        left = 1 / (count * (kernel @ right))
        plan = left[:, None] * kernel * right[None]

    return (cost * plan.detach()).sum()


def twin(objective, config, output, batch):
    """Compute a loss in float64, one target at a time."""
    total = output.itm_logits.new_zeros((), dtype=torch.float64)
    if objective == "itm":
        logits = output.itm_logits.double()
        for row, label in enumerate(batch.mismatched.tolist()):
            total = total - logits[row].log_softmax(0)[label]
        return total / len(batch)

    if objective == "wra":
        for sample in range(len(batch)):
            words = output.text_hidden[batch.text_offsets[sample] : batch.text_offsets[sample + 1]]
            start = int(batch.image_offsets[sample]) + 1
            regions = output.image_hidden[start : batch.image_offsets[sample + 1]]
            sign = -1 if batch.mismatched[sample] else 1
            total = total + sign * distance_of(words.double(), regions.double())
        return 0.1 * total / len(batch)

    if objective == "vqa":
        logits = output.task_outputs["vqa"].double()
        pairs = zip(batch.label_owner.tolist(), batch.labels.tolist(), strict=True)
        for row, label in pairs:
            total = total - logits[row].log_softmax(0)[label]
        return total / len(batch.labels)

    if objective == "msm":
        for place, label in enumerate(batch.msm_labels.tolist()):
            total = total - output.msm_logits[place].double().log_softmax(0)[label]
        return total / len(batch.msm_labels)

    region_tokens = batch.region_rows.tolist()
    for target, token in enumerate(batch.mrm_positions.tolist()):
        ids = batch.mrm_class_ids[target]
        probs = batch.mrm_class_probs[target].double()
        if objective == "attributes":
            known = batch.mrm_attribute_rows.tolist()
            if target in known:
                place = known.index(target)
                log_model = output.attribute_logits[target].double().log_softmax(0)
                share = batch.mrm_attribute_probs[place].double()
                total = total - log_model[int(batch.mrm_attribute_ids[place])] * share
            continue

        if objective == "mrfr":
            feature = batch.features[region_tokens.index(token)].double()
            if config.mrfr_normalise:
                spread = ((feature - feature.mean()) ** 2).mean()
                feature = (feature - feature.mean()) / (spread + 1e-5).sqrt()
            squares = (output.mrfr_features[target].double() - feature) ** 2
            total = total + (squares.sum() if config.mrfr_reduction == "sum" else squares.mean())
            continue

        log_model = output.mrm_logits[target].double().log_softmax(0)
        if objective == "mrc":
            pairs = list(zip(probs.tolist(), ids.tolist(), strict=True))
            best, label = max([(p, c) for p, c in pairs if c and p > 0] or pairs)
            total = total - log_model[label] * (best if config.mrc_confidence else 1)
            continue

        whole = torch.full((len(log_model),), 1.0, dtype=torch.float64)
        whole *= (1 - probs.sum()) / (len(log_model) - len(ids))
        whole[ids] = probs
        total = total + (whole * (whole.log() - log_model)).sum()

    targets = batch.mrm_attribute_rows if objective == "attributes" else batch.mrm_positions

    return total / len(targets)


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
def test_losses_and_gradients_against_float64(store, objective, more):
    config = settings(store, objective, **more)
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


def test_losses_add_up_by_their_weights(store):
    every = ",".join(OBJECTIVES)
    config = settings(store, every, objective_weights="mrfr:0.5,wra:2,itm:3")
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


def share_on_ranks(store, objectives, tensor, path):
    """Compare a rank's share of a step, summed over ranks, with the whole step in one process."""
    state = ParallelState(tensor)
    config = settings(store, objectives)
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
def test_losses_do_not_depend_on_the_layout(store, tmp_path, ranks, tensor):
    every = ",".join(OBJECTIVES)
    config = settings(store, every)
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
    run_on_ranks(ranks, share_on_ranks, store, every, tensor, str(tmp_path / "whole.pt"))


def test_a_plan_never_couples_two_samples(store):
    config = settings(store, "itm,wra")
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


def test_blocks_hold_each_row_once(store):
    batch = samples_of(settings(store, "itm"))[list(range(SAMPLES))]
    rows = torch.arange(len(batch.locations)).float()[:, None].expand(-1, 3) + 1
    values, taken = as_block(rows, batch.region_rows, batch.image_offsets, 1, batch.max_image - 1)
    assert taken.sum().item() == len(batch.region_rows)
    assert taken.sum(dim=1).tolist() == batch.region_counts.tolist()
    assert values.norm(dim=2)[taken].allclose(torch.ones(1))


def test_each_step_of_a_mix_has_one_objective(store):
    mix = "itm:2,msm:2,mrfr:1,mrm:1"
    config = settings(store, "itm,msm,mrfr,mrm", objective_mix=mix)
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


def test_alignment_joins_the_steps_of_matching(store):
    config = settings(store, "itm,msm,wra", objective_mix="itm:1,msm:1")
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


def test_a_step_of_a_mix_reports_its_own_objective(store):
    config = settings(store, "msm,mrm,itm", objective_mix="msm:1,mrm:1,itm:1")
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
