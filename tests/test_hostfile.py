"""Test the deepspeed launcher with a hostfile, between two machines with their own addresses and
sshd (network namespaces).
"""

import pytest

from tests.hosts import Hosts, missing
from tests.launching import TINY, deepspeed, launch, losses, steps, until

WHY_NOT = missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
FLAGS = (*TINY, "--num-workers", 0)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(tmp_path_factory.mktemp("hosts")) as machines:
        yield machines


def test_two_machines_train_as_two_processes_do(hosts, store, tmp_path):
    def flags(name):
        return ("--data-path", store, "--save", tmp_path / name, *FLAGS, "--train-iters", 5)

    process = hosts.deepspeed(*flags("hosts"))
    assert process.wait(120) == 0, hosts.log()
    code, out, err = launch(*deepspeed(2, *flags("here")))
    assert code == 0, out + err
    assert losses(tmp_path / "hosts") == losses(tmp_path / "here")


def test_a_pulled_cable_ends_the_run(hosts, store, tmp_path):
    """Check that both sides notice by themselves if neither packets nor errors get through.

    This must be the last test: the cable stays unplugged.
    """
    run = tmp_path / "run"
    process = hosts.deepspeed(
        "--data-path", store, "--save", run, *FLAGS, "--train-iters", 1_000_000, "--hang-timeout", 8
    )
    until(lambda: steps(run) >= 3, "three steps")
    ranks = until(hosts.ranks, "ranks")
    assert len(ranks) == 2
    hosts.pull_the_cable()
    until(lambda: not hosts.ranks(), "both ranks end", seconds=90)
    process.kill()  # its ssh to the other machine waits for packets
    assert "has shown no sign of life for" in hosts.log()
