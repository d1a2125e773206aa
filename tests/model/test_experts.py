"""Test experts on one process: against plain loops, the dense MLP, and samples alone."""

import dataclasses

import pytest
import torch

from megatron_interbert.data.packing import pack
from megatron_interbert.errors import UsageError
from megatron_interbert.kernels.sequences import Sequences
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.model.routing_groups import RoutingRule, describe_tokens, within_capacity
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from tests.model.test_model import examples
from tests.sizes import WIDER_WEIGHTS
from tests.training.plain_experts import plain_capacity, use_plain_experts

ALONE = ParallelState()


def make(rule=None, **changes):
    sizes = dataclasses.replace(WIDER_WEIGHTS, **changes).without_dropout()
    model = InterBert(sizes, rule=rule)
    initialise(model, sizes, 0, ALONE)
    return model


def results(model, batch):
    """Return the loss of a batch and the gradients by name."""
    loss, _ = PretrainingTask().loss(model(batch), batch, batch.target_counts())
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_one_expert_is_the_dense_mlp():
    batch = pack(examples(4), 20)
    dense = make()
    single = make(experts=1)
    weights = dense.state_dict()
    for name, parameter in single.named_parameters():
        if "router" not in name:
            whole = weights[name.replace(".experts", "")]
            parameter.data.copy_(whole.view(parameter.shape))

    loss, gradients = results(single, batch)
    expected, wanted = results(dense, batch)
    assert torch.equal(loss, expected)
    for name, gradient in gradients.items():
        if "router" in name:
            assert not gradient.any(), name
        else:
            same = wanted[name.replace(".experts", "")]
            assert torch.equal(gradient, same.view(gradient.shape)), name


@pytest.mark.parametrize("prototypes", [1, 2, 3, 6])
def test_prototypes_against_a_plain_loop(prototypes):
    batch = pack(examples(5), 20)
    model = make(experts=6, prototypes=prototypes).double()
    loss, gradients = results(model, batch)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    model.zero_grad()
    use_plain_experts(model)
    expected, wanted = results(model, batch)

    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-8, msg=name)


def test_the_first_of_equal_experts_is_chosen():
    model = make(experts=4, prototypes=2)
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data.zero_()

    figures = model(pack(examples(3), 20)).router_figures
    tokens = figures[:, -1]
    zero = torch.zeros_like(tokens)
    assert torch.equal(figures[:, :4], torch.stack([tokens, zero, tokens, zero], dim=1))


def test_a_sample_does_not_feel_its_neighbours():
    model = make(experts=6, prototypes=2).eval()
    samples = examples(4)
    together = model(pack(samples, 20))
    for number, sample in enumerate(samples):
        alone = model(pack([sample], 20))
        torch.testing.assert_close(
            alone.pooled_text[0], together.pooled_text[number], rtol=1e-4, atol=1e-5
        )


def test_experts_in_some_stacks_only():
    names = [name for name, _ in make(experts=2, expert_stacks="text").named_parameters()]
    with_experts = {name.split(".")[0] for name in names if "experts" in name}
    assert with_experts == {"text_stream"}


def test_shared_layers_are_one_layer_used_again():
    sizes = {"interaction_layers": 3, "text_layers": 2, "experts": 2}
    shared = make(share_layers=True, **sizes)
    untied = make(**sizes)
    weights = shared.state_dict()
    for name, parameter in untied.named_parameters():
        stack, *rest = name.split(".")
        if rest[0] == "layers":
            name = ".".join([stack, "layers", "0", *rest[2:]])
        parameter.data.copy_(weights[name])

    batch = pack(examples(4), 20)
    loss, gradients = results(shared, batch)
    expected, wanted = results(untied, batch)
    assert torch.equal(loss, expected)
    name = "interaction.layers.{}.mlp.experts.up.weight"
    summed = sum(wanted[name.format(number)] for number in range(3))
    torch.testing.assert_close(gradients[name.format(0)], summed)


def test_presets_count_as_the_published_models():
    """Compare with the totals of M6's line, in billions."""
    totals = {"m6-1.4b": 1.39, "m6-10b": 10.81, "m6-100b": 103.28, "m6-1t": 1003.3}
    for name, expected in totals.items():
        sizes = dataclasses.replace(PRESETS[name], feature_dim=2048, num_classes=1601)
        with torch.device("meta"):
            model = InterBert(sizes)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert total / 1e9 == pytest.approx(expected, rel=0.01), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": 6, "prototypes": 4}, "not a multiple of prototypes"),
        ({"prototypes": 2}, "there are no experts"),
        ({"experts": 2, "expert_stacks": "text,audio"}, "expert_stacks is 'text,audio'"),
        ({"experts": -1}, "experts is -1"),
        ({"share_layers": 1}, "share_layers is 1, expected true or false"),
    ],
)
def test_sizes_that_make_no_sense(changes, said):
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(WIDER_WEIGHTS, **changes)


def test_capacity_against_a_plain_loop():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1, 4, 2, 5, 3, 2, 4])
    offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    rule = RoutingRule(capacity_factor=0.75, group=2, partitions=2)
    sequences = Sequences(offsets, 5)
    positions = torch.randperm(24)[:17]  # as in a last layer: some tokens, in another order
    rows = torch.cat([positions, torch.full((3,), 24)])  # and padding
    tokens = describe_tokens(rule, sequences, rows, 17, 8)
    expert = torch.stack([torch.randint(0, 3, (20,)), torch.randint(3, 6, (20,))], dim=1)

    fits = within_capacity(expert, tokens.groups, 6)[:17]
    sample = torch.repeat_interleave(torch.arange(8), lengths)[positions].tolist()
    # two partitions in turn, two samples of each in a group
    group = [[0, 1, 0, 1, 2, 3, 2, 3][number] for number in sample]
    expected = plain_capacity(expert[:17].tolist(), group, positions.tolist(), 6, 0.75)
    assert fits.tolist() == expected
    assert not fits.all()
