"""The vote of the ranks on ending early."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_interbert.signals import STOPPING
from megatron_interbert.training import stopping


@pytest.fixture
def stop(monkeypatch):
    """The vote of one rank of two, of which the other never wants to end; the signals' handlers are given back."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    monkeypatch.setattr(dist, "new_group", lambda backend: backend)
    monkeypatch.setattr(stopping, "read_launch", lambda: SimpleNamespace(launcher="python"))
    yield stopping.Stopping(SimpleNamespace(exit_duration_in_mins=0, exit_interval=0), SimpleNamespace(world_size=2))
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_in_the_middle_of_a_vote_is_not_lost(stop, monkeypatch):
    """It has come too late for this vote and counts in the next."""
    monkeypatch.setattr(dist, "all_reduce", lambda vote, op, group: os.kill(os.getpid(), signal.SIGUSR1))
    assert stop.agreed(1) == ""
    assert not stop.preempted
    monkeypatch.setattr(dist, "all_reduce", lambda vote, op, group: None)
    assert stop.agreed(2) == "SIGUSR1"
    assert stop.preempted
