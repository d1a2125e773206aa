"""Each kernel against its plain twin: values and gradients. Triton's kernels run in its CPU interpreter."""

import pytest
import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.kernels import attention, plain
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.kernels.gather import gather_rows
from tests.kernels.sequences import packed


@pytest.mark.parametrize("lengths", [[5], [1, 7, 3], [4, 0, 2], [0, 3]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_padded_sdpa_equals_one_sequence_at_a_time(lengths, dtype):
    torch.manual_seed(0)
    (q, k, v), offsets = packed(lengths, dtype=dtype)
    weight = torch.randn(sum(lengths), 3, 8, dtype=dtype)
    results, gradients = [], []
    for function in (plain.attention, attention.padded_sdpa):
        out = function(q, k, v, offsets, max(lengths), 0.0)
        gradients.append(torch.autograd.grad((out * weight).sum(), (q, k, v)))
        results.append(out)
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(*results, **tolerance)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.isfinite(theirs).all()
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_attention_dropout_drops_at_its_rate_and_scales_the_rest():
    """With one-hot values an output is the row of attention weights itself: each is 0 or its plain value / (1 - p)."""
    torch.manual_seed(0)
    (q, k, _), offsets = packed([8] * 400, heads=2)
    v = torch.eye(8).repeat(400, 1)[:, None, :].expand(-1, 2, -1).contiguous()
    plain_weights = attention.padded_sdpa(q, k, v, offsets, 8, 0.0)
    dropped_weights = attention.padded_sdpa(q, k, v, offsets, 8, 0.25)
    gone = dropped_weights == 0
    assert abs(gone.float().mean().item() - 0.25) < 0.01
    torch.testing.assert_close(dropped_weights[~gone], plain_weights[~gone] / 0.75)


def test_gather_rows_has_the_gradient_of_indexing():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    weight = torch.randn(6, 4, dtype=torch.float64)
    (ours,) = torch.autograd.grad((gather_rows(x, order, order.argsort()) * weight).sum(), x)
    (theirs,) = torch.autograd.grad((x[order] * weight).sum(), x)
    assert torch.equal(ours, theirs)


def test_choice_names_what_it_takes_and_refuses_what_cannot_run():
    assert "attention=attention.padded_sdpa" in choose_kernels("auto", torch.device("cpu")).describe()
    with pytest.raises(UsageError, match="apex"):
        choose_kernels("apex", torch.device("cpu"))
