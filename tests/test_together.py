"""Test ranks as on separate machines (started by hand, without a launcher): they meet, agree, stop
together, and never hang.
"""

import os
import re
import shutil
import signal
import socket
import time

import psutil
import pytest

from tests.corpus import write_store
from tests.launching import (
    ROOT,
    TINY,
    deepspeed,
    ends,
    free_ports,
    losses,
    pretrain,
    records,
    start,
    start_ranks,
    steps,
    until,
)

ENDLESS = ("--train-iters", 1_000_000)
HANGS = ("--hang-timeout", 6)


def error_line(err):
    return next(line for line in err.splitlines() if line.startswith("error"))


# They cannot meet, or do not agree.


@pytest.fixture(scope="module", autouse=True)
def lonely_ranks(store):
    """Start two ranks whose partners never come, of which the last test of this file hears: they
    give up after two minutes, in which the others run.
    """
    flags = ("--data-path", store, *TINY, "--train-iters", 2)
    zero = start_ranks(flags, world_size=2)
    one = start_ranks(flags, world_size=2, first=1)
    yield zero, one

    for process in (*zero, *one):
        if process.poll() is None:
            process.kill()


def test_ranks_that_do_not_fit_together_do_not_start(store, tmp_path):
    """Check missing or different data, code and flags: all ranks end alike and name the one that
    differs, and nothing is written.
    """
    other = write_store(tmp_path / "other", seed=5)
    copy = shutil.copytree(ROOT / "megatron_interbert", tmp_path / "code" / "megatron_interbert")
    (copy / "errors.py").write_text((copy / "errors.py").read_text() + "# changed\n")
    save = tmp_path / "run"

    def flags(data, *more):
        return ("--data-path", data, "--save", save, *TINY, "--train-iters", 2, *more)

    cases = {
        "on n1 (ranks 1 of 2): /nowhere: no manifest.json there": [flags(store), flags("/nowhere")],
        "the ranks differ in data: ": [flags(store), flags(other)],
        "the ranks differ in --seed: 1234 on n0 (rank 0), 7 on n1 (rank 1)": [
            flags(store),
            flags(store, "--seed", 7),
        ],
    }
    for message, each in cases.items():
        for code, out, err in ends(start_ranks(*each)):
            assert code == 2, out + err
            assert message in error_line(err)
            assert "Traceback" not in err

    port = free_ports(1)[0]
    first = start_ranks(flags(store), world_size=2, port=port)
    second = start_ranks(
        flags(store),
        world_size=2,
        first=1,
        port=port,
        PYTHONPATH=str(tmp_path / "code"),
        PYTHONSAFEPATH="1",
    )
    for code, out, err in ends(first + second):
        assert code == 2, out + err
        assert "the ranks differ in code: " in error_line(err)

    assert not save.exists()


def test_a_folder_that_cannot_be_written(store, tmp_path):
    (tmp_path / "file").write_text("")
    for code, out, err in ends(
        start_ranks(*[("--data-path", store, "--save", tmp_path / "file" / "run", *TINY)] * 2)
    ):
        assert code == 2, out + err
        assert "nothing can be written there (Not a directory)" in error_line(err)


def test_preflight_shows_the_machines_and_the_odd_one(store, tmp_path):
    flags = ("--data-path", store, *TINY, "--fast", "--train-iters", 2, "--save", tmp_path / "run")
    whole = start_ranks(flags, flags, module="megatron_interbert.preflight")
    (code, out, err), (other, _, _) = ends(whole)
    assert (code, other) == (0, 0), out + err
    table = out.splitlines()[:4]
    assert table[0].startswith("python: 2 ranks on 2 nodes, meeting at 127.0.0.1:")
    assert [line.split()[0] for line in table[1:]] == ["node", "n0", "n1"]
    assert "shared" in table[3]
    assert out.rstrip().endswith("ready")
    odd = write_store(tmp_path / "odd", seed=9)
    results = ends(
        start_ranks(flags, ("--data-path", odd, *flags[2:]), module="megatron_interbert.preflight")
    )
    assert [code for code, _, _ in results] == [2, 2]
    assert next(line for line in results[0][1].splitlines() if line.startswith("n1")).endswith(
        "<- data"
    )
    assert "n1: data is " in results[0][2]
    assert not list(tmp_path.glob(".shared-*"))


# They stop together.


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_any_rank_stops_all_and_the_losses_go_on(store, tmp_path, number):
    """Check that both ranks save after the same step and end with code 75, and that the run resumes
    bit for bit.
    """
    flags = ("--data-path", store, *TINY, "--num-workers", 1, "--tensor-model-parallel-size", 2)
    flags = (*flags, "--worker-start", "spawn" if number == signal.SIGTERM else "fork")
    stopped = start_ranks(*[(*flags, *ENDLESS, "--save", tmp_path / "run")] * 2)
    until(lambda: steps(tmp_path / "run") >= 3, "three steps")
    stopped[1].send_signal(number)
    for code, out, err in ends(stopped):
        assert code == 75, out + err

    last = max(records(tmp_path / "run"))
    assert (tmp_path / "run" / f"global_step{last}" / "manifest.json").is_file()
    goal = (*flags, *ENDLESS, "--exit-interval", last + 4)
    for folder in ("run", "whole"):
        for code, out, err in ends(start_ranks(*[(*goal, "--save", tmp_path / folder)] * 2)):
            assert code == 0, out + err

    assert max(losses(tmp_path / "whole")) == last + 4
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_launcher_passes_the_signal_on(store, tmp_path):
    """Send SIGTERM to the deepspeed command only, which ends without telling its ranks: they save
    and end.
    """
    process = start(
        *deepspeed(2, "--data-path", store, "--save", tmp_path / "run", *TINY, *ENDLESS)
    )
    until(lambda: steps(tmp_path / "run") >= 3, "three steps")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)  # until the last rank has closed its output
    last = max(records(tmp_path / "run"))
    stopped = f"stopped after step {last} (SIGHUP: a terminal or a launcher has gone);"
    assert f"{stopped} the same command resumes from {tmp_path}/run/global_step{last}" in out, (
        out + err
    )
    assert (tmp_path / "run" / f"global_step{last}" / "manifest.json").is_file(), out + err


def test_a_run_ends_after_its_minutes(store, tmp_path):
    """Check that all ranks save and end when the time is up."""
    run = start_ranks(
        *[
            (
                "--data-path",
                store,
                "--save",
                tmp_path / "run",
                *TINY,
                *ENDLESS,
                "--exit-duration-in-mins",
                0.15,
            )
        ]
        * 2
    )
    for code, out, err in ends(run):
        assert code == 0, out + err

    last = max(records(tmp_path / "run"))
    assert (tmp_path / "run" / f"global_step{last}" / "manifest.json").is_file()


def test_a_signal_ends_an_evaluation_of_losses_early(store, tmp_path):
    """Check an endless evaluation: both ranks abandon it after the same batch and save; the same
    command runs it first.
    """
    flags = (
        "--data-path",
        store,
        "--valid-data-path",
        store,
        *TINY,
        "--train-iters",
        20,
        "--eval-interval",
        4,
        "--eval-iters",
        1_000_000,
    )
    run = start_ranks(*[(*flags, "--save", tmp_path / "run")] * 2)
    until(lambda: steps(tmp_path / "run") == 4, "the evaluation")
    time.sleep(1)
    run[1].send_signal(signal.SIGTERM)
    for code, out, err in ends(run):
        assert code == 75, out + err

    assert (tmp_path / "run" / "global_step4" / "manifest.json").is_file()
    assert not records(tmp_path / "run", "valid")
    run = start_ranks(
        *[(*flags, "--eval-iters", 1, "--exit-interval", 8, "--save", tmp_path / "run")] * 2
    )
    for code, out, err in ends(run):
        assert code == 0, out + err

    assert sorted(records(tmp_path / "run", "valid")) == [4, 8]


def test_without_a_folder_a_signal_keeps_nothing_and_promises_nothing(store):
    """Check that this is said at the start, and that the exit code does not requeue a job."""
    process = start(*pretrain("--data-path", store, *TINY, *ENDLESS))
    until(lambda: "train step 3/" in process.so_far(), "three steps")
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1
    assert "no --save: nothing will be kept" in out
    assert re.fullmatch(r"stopped after step \d+ \(SIGUSR1\)", out.splitlines()[-1])
    assert "resumes" not in out + err


def test_ctrl_c_saves_and_the_second_one_ends_at_once(store, tmp_path):
    """Send the first to both ranks, as a terminal does, and the second to a hanging rank."""
    flags = ("--data-path", store, "--save", tmp_path / "run", *TINY, *ENDLESS)
    ranks = start_ranks(flags, flags)
    until(lambda: steps(tmp_path / "run") >= 3, "three steps")
    for rank in ranks:
        rank.send_signal(signal.SIGINT)

    results = ends(ranks)
    last = max(records(tmp_path / "run"))
    saved = tmp_path / "run" / f"global_step{last}"
    assert [code for code, _, _ in results] == [130, 130], results
    assert "SIGINT: the run saves and ends after this step; Ctrl-C again ends it" in results[0][2]
    assert (
        f"stopped after step {last} (SIGINT); the same command resumes from {saved}"
        in results[0][1]
    )
    assert (saved / "manifest.json").is_file()

    ranks = start_ranks(flags, flags)
    until(lambda: steps(tmp_path / "run") > last, "it has resumed")
    ranks[1].send_signal(signal.SIGSTOP)  # rank 0 waits for it in a collective
    time.sleep(1)
    ranks[0].send_signal(signal.SIGINT)
    time.sleep(1)
    ranks[0].send_signal(signal.SIGINT)
    [(code, out, err)] = ends(ranks[:1], timeout=10)
    ranks[1].kill()
    assert code == 130, out + err
    assert "SIGINT again: ended at once" in err
    assert saved.is_dir()


# They never hang.


@pytest.fixture
def running(store, tmp_path):
    """Return a function that starts two endless ranks; they are killed afterwards."""
    started = []

    def begin(*more, **changes):
        flags = ("--data-path", store, "--save", tmp_path / "run", *TINY, *ENDLESS, *HANGS, *more)
        started.extend(start_ranks(flags, flags, **changes))
        until(three_steps, "three steps")
        return started

    def three_steps():
        ended = [process for process in started if process.poll() is not None]
        assert not ended, ends(ended)
        return steps(tmp_path / "run") >= 3

    yield begin
    for process in started:
        process.kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_the_run_ends(running, rank):
    ranks = running("--num-workers", 0)
    ranks[rank].send_signal(signal.SIGSTOP)
    [(code, out, err)] = ends([ranks[1 - rank]])
    assert code == 1, out + err
    named = (
        "rank 1 on n1 has shown no sign of life for" if rank else "rank 0 does not answer and step"
    )
    assert named in error_line(err)
    assert "loop.py" in err, "the stacks of all threads"
    if rank:  # it is on this machine, although its node has another name
        assert ranks[1].wait(10) == -signal.SIGKILL


def test_a_rank_that_goes_on_in_time_changes_nothing(running, tmp_path):
    ranks = running("--num-workers", 0)
    before = steps(tmp_path / "run")
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    ranks[1].send_signal(signal.SIGCONT)
    until(lambda: steps(tmp_path / "run") > before + 20, "training continues")
    ranks[0].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in ends(ranks)] == [75, 75]


def test_a_rank_that_waits_for_its_data_is_named(running):
    """Stop its loader process; the other rank waits in a collective."""
    ranks = running("--num-workers", 1)
    loader = until(lambda: psutil.Process(ranks[1].pid).children(), "a loader process")[0].pid
    os.kill(loader, signal.SIGSTOP)
    results = ends(ranks)
    until(lambda: dead(loader), "stopped as it was, it dies with its rank", seconds=10)
    assert [code for code, _, _ in results] == [1, 1]
    assert "the run hangs: rank 1 on n1 is in waiting for the data of step" in error_line(
        results[0][2]
    )
    assert "loader.py" in results[1][2]


def test_an_evaluation_ends_at_a_signal_and_does_not_hang(store, tmp_path):
    [(code, out, err)] = ends(
        [
            start(
                *pretrain(
                    "--data-path", store, "--save", tmp_path / "run", *TINY, "--train-iters", 1
                )
            )
        ]
    )
    assert code == 0, out + err
    flags = (
        "retrieval",
        "--load",
        tmp_path / "run",
        "--data-path",
        store,
        "--output",
        tmp_path / "result",
        "--hang-timeout",
        2,
    )
    flags = (*flags, "--tile-captions", 1, "--tile-images", 4, "--batch-pairs", 4)  # 800 tiles

    def tiles():
        return len(list((tmp_path / "result").glob("tiles-*/*.npy")))

    ranks = start_ranks(flags, flags, module="megatron_interbert.evaluate")
    until(tiles, "a tile")
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)
    for code, out, err in ends(ranks):
        assert code == 75, out + err
        assert "SIGUSR1: ended; the same command starts again or resumes" in err

    kept = tiles()
    assert kept < 800
    ranks = start_ranks(flags, flags, module="megatron_interbert.evaluate")

    try:
        until(lambda: tiles() > kept, "another tile")
        ranks[1].send_signal(signal.SIGSTOP)
        [(code, out, err)] = ends(ranks[:1])
        assert code == 1, out + err
        assert "the run hangs: rank 1 on n1 has shown no sign of life" in error_line(err)
    finally:
        ranks[1].kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_takes_the_other_with_it(running, rank):
    """Kill a rank that was started cold: its exit status can be read until its parent asks for it,
    which the fork server does at once.
    """
    # Cold processes on a busy machine may take longer than HANGS for their first step.
    ranks = running("--num-workers", 0, "--hang-timeout", 60, PYTHONUNBUFFERED="1")
    ranks[rank].kill()
    [(code, out, err)] = ends([ranks[1 - rank]], timeout=30)
    assert code == 1, out + err
    who = "rank 1 on n1" if rank else "rank 0"
    killed = rf"{who} \(pid {ranks[rank].pid}\) was killed by SIGKILL \(memory ran out\?\)"
    assert re.search(killed, err), err


def test_what_keeps_ranks_apart_is_said_in_one_line(store, lonely_ranks):
    zero, one = lonely_ranks
    flags = ("--data-path", store, *TINY, "--train-iters", 2)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port_taken = start_ranks(flags, world_size=2, port=taken.getsockname()[1])
        cases = {
            "rank 0 on n0 cannot listen at 127.0.0.1": ends(port_taken),
            "of 2 ranks 1 have not come to 127.0.0.1": ends(zero),
            "rank 1 on n1 has not reached rank 0 at 127.0.0.1": ends(one),
        }

    for message, [(code, out, err)] in cases.items():
        assert code == 2, out + err
        assert message in error_line(err)
        assert "Traceback" not in err


def dead(pid):
    """Check whether a process is gone, or a zombie whose parent has not asked for its status."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
