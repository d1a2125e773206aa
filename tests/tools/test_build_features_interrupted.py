"""Test Ctrl-C, which reaches all processes of a command: one word, code 130, no output from
processes that were starting or working.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_interbert.preparation.building.interrupts import (
    interrupts_blocked,
    keeping_interrupts,
)
from tests.launching import start
from tests.preparation.formats import made_up_images, write_npz
from tests.tools.building import command


def processes_of(group):
    """Return the ids of a process group's members, from /proc."""
    found = []

    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            facts = open(f"/proc/{name}/stat").read().rpartition(")")[2].split()
        except OSError:
            continue

        if facts[0] != "Z" and int(facts[2]) == group:
            found.append(int(name))

    return found


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["processes start", "they import", "they work"])
def test_ctrl_c_is_one_word(tmp_path, moment):
    npz = write_npz(tmp_path / "npz", made_up_images(600, features=256))
    flags = (npz, "--output", tmp_path / "store", "--workers", 2, "--images-per-shard", 5)
    work = tmp_path / "store.partial"
    process = start(*command(*flags))

    until(lambda: len(processes_of(process.pid)) > 2)
    if moment == "they import":
        time.sleep(0.3)
    if moment == "they work":
        until(lambda: list(work.glob("shard-*.json")))

    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert (process.returncode, err.strip()) == (130, "interrupted")
    finished = list(work.glob("shard-*.json"))
    assert work.exists() == bool(finished), "nothing is left that the next command cannot use"
    assert finished or moment != "they work"
    until(lambda: not processes_of(process.pid))


def test_it_is_kept_until_it_is_asked_for():
    with keeping_interrupts() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        with interrupts_blocked():
            assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with pytest.raises(KeyboardInterrupt):
            check()

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_process_that_crashes_is_one_line(tmp_path):
    """End a process as a segmentation fault in a library would."""
    npz = write_npz(tmp_path / "npz", made_up_images(600, features=256))
    flags = (npz, "--output", tmp_path / "store", "--workers", 2, "--images-per-shard", 5)
    process = start(*command(*flags))
    until(lambda: list((tmp_path / "store.partial").glob("shard-*.json")))

    for number in processes_of(process.pid):
        if "spawn_main" in Path(f"/proc/{number}/cmdline").read_text():
            os.kill(number, signal.SIGSEGV)
            break

    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(err.strip().splitlines()) == 1
    assert "a process of the build has died" in err
