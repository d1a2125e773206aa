"""Test the ranks' vote on ending early."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.errors import TrainingStopped
from megatron_interbert.signals import STOPPING
from megatron_interbert.training import stopping


@pytest.fixture
def stop(monkeypatch):
    """Build the vote of one of two ranks, of which the other never asks to end; restore signal
    handlers afterwards.
    """
    before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGINT)}
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: backend)
    monkeypatch.setattr(stopping, "read_launch", lambda: SimpleNamespace(launcher="python"))
    monkeypatch.setattr(stopping, "end_at_second_interrupt", lambda speaks: None)
    yield stopping.Stopping(RunConfig(save="run"), SimpleNamespace(world_size=2, is_main=True))
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_in_the_middle_of_a_vote_is_not_lost(stop, monkeypatch):
    """Check that it is too late for this vote and counts in the next."""
    monkeypatch.setattr(
        dist, "all_reduce", lambda vote, op, group: os.kill(os.getpid(), signal.SIGUSR1)
    )
    assert stop.agreed(1) == ""
    assert not stop.signal_number
    monkeypatch.setattr(dist, "all_reduce", lambda vote, op, group: None)
    assert stop.agreed(2) == "SIGUSR1"
    assert stop.signal_number == signal.SIGUSR1


def test_a_problem_of_one_rank_ends_all(stop, monkeypatch):
    """Check the rank that has it and the rank that only learns of it in the vote."""
    stop.state.gather = lambda value, group: [value, "a shard has changed"]
    monkeypatch.setattr(dist, "all_reduce", lambda vote, op, group: vote.fill_(1))
    for own in ("", "a shard has changed"):
        with pytest.raises(TrainingStopped, match="a shard has changed"):
            stop.agreed(1, own)


def test_the_clock_of_rank_0_asks_for_checkpoints(stop, monkeypatch):
    """Check that a save is due every ten minutes, unless --save-interval is given without
    --save-interval-in-mins.
    """
    monkeypatch.setattr(dist, "all_reduce", lambda vote, op, group: None)
    now = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stop.saved()

    for minutes, due in ((9.9, False), (10.1, True)):
        now[0] = 1000.0 + 60 * minutes
        stop.agreed(1)
        assert stop.save_is_due == due

    stop.saved()
    stop.agreed(2)
    assert not stop.save_is_due

    now[0] += 3600
    stop.config.given = {"save_interval"}
    stop.agreed(3)
    assert not stop.save_is_due
    stop.config.given = {"save_interval", "save_interval_in_mins"}
    stop.agreed(4)
    assert stop.save_is_due
    stop.state.is_main = False
    stop.agreed(5)
    assert not stop.save_is_due, "the others do not ask by their own clocks"
