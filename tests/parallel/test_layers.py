"""Test tensor-parallel layers against plain ones (values and gradients, on 2 and 4 ranks), the loss
against torch's, and the random streams.
"""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_interbert.kernels import plain
from megatron_interbert.kernels.choice import Kernels
from megatron_interbert.kernels.products import PlainProducts
from megatron_interbert.kernels.sequences import Sequences
from megatron_interbert.model.partition import shard
from megatron_interbert.model.transformer import Mlp, TransformerLayer, TransformerStack
from megatron_interbert.parallel import vocab_loss
from megatron_interbert.parallel.collectives import copy_to_group
from megatron_interbert.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron_interbert.parallel.placement import Placement
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.parallel.vocab_loss import VocabMath, vocab_parallel_loss
from tests.dist import run_on_ranks

DOUBLE = {"dtype": torch.float64}


def slice_of(tensor, dimension, state):
    return tensor.chunk(state.tensor_size, dimension)[state.tensor_rank]


def check_linear_pair(state):
    """Check that a column- then a row-parallel layer, with an activation between, equal an MLP."""
    torch.manual_seed(0)
    up = torch.randn(24, 8, **DOUBLE)
    down = torch.randn(8, 24, **DOUBLE)
    bias = torch.randn(24, **DOUBLE)
    x = torch.randn(5, 8, **DOUBLE, requires_grad=True)
    weight = torch.randn(5, 8, **DOUBLE)
    plain = [t.clone().requires_grad_() for t in (up, bias, down)]
    expected = F.linear(torch.tanh(F.linear(x, plain[0], plain[1])), plain[2])
    gradients = torch.autograd.grad((expected * weight).sum(), [x, *plain])

    column = ColumnParallelLinear(
        8, 24, state.placement, PlainProducts, activation=lambda y, b: torch.tanh(y + b)
    ).double()
    row = RowParallelLinear(24, 8, state.placement, PlainProducts).double()

    with torch.no_grad():
        column.weight.copy_(slice_of(up, 0, state))
        column.bias.copy_(slice_of(bias, 0, state))
        row.weight.copy_(slice_of(down, 1, state))

    result = row(column(x))
    torch.testing.assert_close(result, expected)
    ours = torch.autograd.grad((result * weight).sum(), [x, column.weight, column.bias, row.weight])
    wanted = [
        gradients[0],
        slice_of(gradients[1], 0, state),
        slice_of(gradients[2], 0, state),
        slice_of(gradients[3], 1, state),
    ]
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


def check_shared_rows(state):
    """Check in float64 that layers with rows split between them equal plain ones: for any number of
    tokens, for sequences of one token, and for a last layer computed for some rows only.
    """

    def stack(placement, layers=2):
        parts = [
            TransformerLayer(
                8,
                4,
                Mlp(8, 16, placement, Kernels()),
                *(0.0, 0.0, 1e-12, placement, Kernels(), RandomStreams(0)),
            )
            for _ in range(layers)
        ]
        return TransformerStack(parts, placement, RandomStreams(0), recompute=False).double()

    shared = ParallelState(state.tensor_size, sequence_parallel=True).placement
    plain = stack(Placement())
    ours = stack(shared)
    torch.manual_seed(4)

    for name, parameter in plain.named_parameters():
        nn.init.normal_(parameter, std=0.5)
        ours.get_parameter(name).data.copy_(
            shard(parameter.data, f"interaction.{name}", state.tensor_rank, state.tensor_size)
        )

    for lengths in ([1], [1, 1], [3], [2, 1, 1], [5, 1, 4], [7, 4]):
        tokens = sum(lengths)
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()

        for rows in (None, torch.randperm(tokens)[: (tokens + 1) // 2]):
            x = torch.randn(tokens, 8, **DOUBLE, requires_grad=True)
            sequences = Sequences(offsets, max(lengths))
            expected, result = (s(x, sequences, rows)[0] for s in (plain, ours))
            torch.testing.assert_close(result, expected)
            weight = torch.randn_like(expected)
            gradients, wanted = (
                torch.autograd.grad((y * weight).sum(), [x, *s.parameters()])
                for y, s in ((result, ours), (expected, plain))
            )

            for (name, _), a, b in zip(
                [("", x), *ours.named_parameters()], gradients, wanted, strict=True
            ):
                whole = (
                    b
                    if not name
                    else shard(b, f"interaction.{name}", state.tensor_rank, state.tensor_size)
                )
                torch.testing.assert_close(
                    a, whole, msg=lambda m, n=name, k=lengths: f"{n} of {k}: {m}"
                )


def check_embedding(state):
    torch.manual_seed(1)
    table = torch.randn(16, 6, **DOUBLE, requires_grad=True)
    ids = torch.tensor([0, 15, 7, 8, 7, 3])
    weight = torch.randn(6, 6, **DOUBLE)
    expected = F.embedding(ids, table)
    (gradient,) = torch.autograd.grad((expected * weight).sum(), table)
    layer = VocabParallelEmbedding(16, 6, state.tensor_group).double()
    with torch.no_grad():
        layer.weight.copy_(slice_of(table, 0, state))

    result = layer(ids)
    torch.testing.assert_close(result, expected)
    (ours,) = torch.autograd.grad((result * weight).sum(), layer.weight)
    torch.testing.assert_close(ours, slice_of(gradient, 0, state))


def check_loss(state):
    """Check losses, gradients and correct predictions against torch in float64: several chunks,
    large logits, padding columns (all of the last of 4 ranks), ties, no rows at all.
    """
    torch.manual_seed(2)
    words = 9
    columns = 16
    table = torch.randn(columns, 6, **DOUBLE)
    hidden = torch.randn(9, 6, **DOUBLE) * 20
    bias = torch.randn(columns, **DOUBLE)
    labels = torch.tensor([1, 0, 4, 3, 2, 1, 0, 4, 8])
    # words 2 and 7 get the same logit, to the last bit, and it is the largest
    tied = F.one_hot(torch.tensor([0]), 6).double()
    table[2] = table[7] = 50.0 * tied[0]
    bias[2] = bias[7] = 0.0
    whole = [t.clone().requires_grad_() for t in (hidden, table, bias)]
    logits = F.linear(*whole)[:, :words]
    expected = F.cross_entropy(logits, labels, reduction="none")
    weight = torch.randn(9, **DOUBLE)
    gradients = torch.autograd.grad((expected * weight).sum(), whole)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            own = columns // state.tensor_size
            self.words = max(0, min(own, words - own * state.tensor_rank))
            self.table, self.bias = (
                nn.Parameter(slice_of(t, 0, state).clone()) for t in (table, bias)
            )

        def forward(self, hidden, labels):
            hidden = copy_to_group(hidden, state.tensor_group)
            math = VocabMath(plain.vocab_statistics, plain.vocab_gradient, PlainProducts)
            return vocab_parallel_loss(
                hidden, self.table, self.bias, labels, self.words, state.tensor_group, math
            )

    head = Head()
    x = hidden.clone().requires_grad_()

    for chunk in (1, 4 * columns // state.tensor_size, vocab_loss.CHUNK):
        with mock.patch.object(vocab_loss, "CHUNK", chunk):
            losses, right = head(x, labels)
            torch.testing.assert_close(losses, expected)
            assert torch.equal(right, logits.argmax(1) == labels)
            ours = torch.autograd.grad((losses * weight).sum(), [x, head.table, head.bias])

        wanted = [gradients[0], slice_of(gradients[1], 0, state), slice_of(gradients[2], 0, state)]
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b)

    assert [head(tied, torch.tensor([label]))[1].item() for label in (2, 7)] == [True, False]
    losses, right = head(x[:0], labels[:0])
    gradients = torch.autograd.grad(losses.sum(), [x, head.table, head.bias])
    assert len(right) == 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


def check_streams(state):
    """Check that dropout is the same on all ranks for replicated activations, differs for sharded
    ones, and is replayed by recomputation.
    """
    alone = state.tensor_size == 1
    streams = RandomStreams(7, state.data_rank, state.tensor_rank, alone=alone)

    def layer(x, w):
        x = F.dropout(x * w, 0.5)
        with streams.sharded():
            y = F.dropout(torch.ones(64) * w, 0.5)
        return (x * y).sum() + F.dropout(x, 0.3).sum()

    def masks(step):
        streams.start_step(step)
        replicated = F.dropout(torch.ones(64), 0.5)
        with streams.sharded():
            sharded = F.dropout(torch.ones(64), 0.5)
        return replicated, sharded, F.dropout(torch.ones(64), 0.5)

    first = masks(1)
    again = masks(1)
    other = masks(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))

    for mask, same in zip(first, (True, False, True), strict=True):
        if alone:
            continue
        gathered = [torch.empty_like(mask) for _ in range(state.tensor_size)]
        dist.all_gather(gathered, mask, group=state.tensor_group)
        for rank in range(1, state.tensor_size):
            assert torch.equal(gathered[0], gathered[rank]) == same

    results = []
    for recompute in (False, True):
        streams.start_step(3)
        w = torch.ones(64, requires_grad=True)
        parts = [
            streams.recompute(layer, torch.ones(64), w) if recompute else layer(torch.ones(64), w)
            for _ in range(3)
        ]
        sum(parts).backward()
        after = F.dropout(torch.ones(64), 0.5)
        with streams.sharded():
            results.append((sum(parts).detach(), w.grad, after, F.dropout(torch.ones(64), 0.5)))

    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_on_ranks(size):
    state = ParallelState(size)
    for check in (check_linear_pair, check_shared_rows, check_embedding, check_loss, check_streams):
        check(state)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_layers_equal_plain_ones(ranks):
    run_on_ranks(ranks, check_on_ranks, ranks)


def test_one_rank_needs_no_process_group():
    state = ParallelState()
    check_linear_pair(state)
    check_embedding(state)
    check_loss(state)
    check_streams(state)


def check_groups():
    state = ParallelState(2)
    assert (state.tensor_rank, state.data_rank) == (dist.get_rank() % 2, dist.get_rank() // 2)
    total = state.sum_over_data(torch.tensor([float(dist.get_rank())]))
    assert total.item() == state.tensor_rank + (state.tensor_rank + 2)
    assert state.get_data_parallel_group_ranks() == [state.tensor_rank, state.tensor_rank + 2]
    assert not hasattr(state, "initialize_sequence_parallel")


def test_groups_of_a_two_by_two_layout():
    run_on_ranks(4, check_groups)


def test_dropout_differs_between_data_parallel_ranks():
    masks = []
    for data_rank in range(2):
        RandomStreams(1, data_rank, 0).start_step(1)
        masks.append(F.dropout(torch.ones(64), 0.5))

    assert not torch.equal(*masks)
