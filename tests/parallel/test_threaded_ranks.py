"""Test the whole model on 64 ranks, which are threads, against one process; more ranks and
recomputation: python -m tests.campaigns.threaded_ranks.
"""

import pytest
import torch

from tests.campaigns import threaded_ranks
from tests.campaigns.threaded_ranks import TOLERANCE, check, run_in_threads


def test_64_ranks_compute_what_one_process_does():
    assert check(64, 16, sequence_parallel=True) < TOLERANCE


@pytest.mark.parametrize(("tensor", "expert"), [(4, 32)])
def test_64_ranks_exchange_rows_with_their_experts(tensor, expert):
    assert check(64, tensor, tensor > 1, expert=expert) < TOLERANCE


def test_a_rank_that_differs_is_seen(monkeypatch):
    build = threaded_ranks.build

    def planted(*arguments):
        model = build(*arguments)
        state = arguments[0]
        if state.rank == 5:
            with torch.no_grad():
                model.interaction.layers[0].mlp.up.weight[0, 0] += 1e-3
        return model

    monkeypatch.setattr(threaded_ranks, "build", planted)
    assert check(8, 4) > 1e-6


def test_an_error_in_one_thread_ends_all():
    def fails(rank):
        if rank == 2:
            raise RuntimeError("planted")
        torch.distributed.barrier()

    with pytest.raises(RuntimeError, match="planted"):
        run_in_threads(4, fails)
