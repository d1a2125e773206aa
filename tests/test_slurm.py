"""Test the shipped .sbatch files on a real Slurm of two nodes: preemption, time limit, killed
ranks, fewer nodes, and the other files.
"""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.launching import TINY, deepspeed, launch, losses, records, steps, until
from tests.preparation.formats import lxmert_line, made_up_images
from tests.slurm import MISSING, Slurm
from tests.tools.building import build, content

pytestmark = pytest.mark.skipif(
    bool(MISSING or os.geteuid()), reason=f"needs root and Debian's slurm-wlm and munge: {MISSING}"
)
FLAGS = (*TINY, "--num-workers", 1)
# the same schedule for all runs
GOAL = 60
SPAN = ("--train-iters", 1_000_000, "--exit-interval", 60)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    """Return losses of two ranks under the deepspeed launcher, up to the step where all stop."""
    folder = tmp_path_factory.mktemp("deepspeed") / "run"
    code, out, err = launch(*deepspeed(2, "--data-path", store, "--save", folder, *FLAGS, *SPAN))
    assert code == 0, out + err
    return losses(folder)


def hasten(slurm, job):
    """Start a requeued job now: Slurm would have it wait for two minutes."""
    until(lambda: slurm.job(job).get("JobState") == "PENDING", f"job {job} is queued again")
    # a start in the same second in which the nodes ended the last one is refused: "Job credential
    # revoked"
    time.sleep(2)
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")


def test_two_nodes_train_as_two_processes_do(slurm, store, undisturbed, tmp_path):
    job = slurm.submit(
        "-N2",
        "launchers/pretrain.sbatch",
        "--data-path",
        store,
        "--save",
        tmp_path / "run",
        *FLAGS,
        *SPAN,
    )
    fields = slurm.wait(job)
    log = slurm.log(job)
    assert fields["JobState"] == "COMPLETED", log
    assert "job 1 on n[0-1], start 1: srun" in log
    assert log.count("on each node: torchrun --nnodes 2 --node-rank 0 ") == 1, log
    assert "layout: DP2 x TP1 (2 ranks, gloo)" in log
    assert losses(tmp_path / "run") == undisturbed


def test_a_signal_queues_the_job_again_and_losses_are_the_same(slurm, store, undisturbed, tmp_path):
    """Use `scancel --signal` midway; then resume by the same command with one node fewer."""
    run = tmp_path / "run"
    command = ("launchers/pretrain.sbatch", "--data-path", store, "--save", run, *FLAGS)
    job = slurm.submit("-N2", *command, *SPAN)
    until(lambda: steps(run) >= 5, "five steps")
    slurm.run("scancel", "--signal=USR1", job)
    until(lambda: "it is queued again" in slurm.log(job), "the job is queued again")
    saved = max(records(run))
    assert (run / f"global_step{saved}" / "manifest.json").is_file()
    hasten(slurm, job)
    assert slurm.wait(job)["JobState"] == "COMPLETED", slurm.log(job)
    assert "start 2: srun" in slurm.log(job)
    assert f"resumed from {run}/global_step{saved}" in slurm.log(job)
    assert losses(run) == undisturbed
    fewer = slurm.submit("-N1", *command, "--train-iters", 1_000_000, "--exit-interval", GOAL + 5)
    assert slurm.wait(fewer)["JobState"] == "COMPLETED", slurm.log(fewer)
    assert "DP2 x TP1, ZeRO-1, fp32 -> DP1 x TP1" in slurm.log(fewer)
    assert "accumulation 2" in slurm.log(fewer), "the global batch is kept"
    assert max(losses(run)) == GOAL + 5


def test_the_time_limit_queues_the_job_again(slurm, store, tmp_path):
    run = tmp_path / "run"
    more = ("--data-path", store, "--save", run, *FLAGS, "--train-iters", 1_000_000)
    job = slurm.submit("-N2", "--time=1", "--signal=USR1@20", "launchers/pretrain.sbatch", *more)
    until(lambda: "it is queued again" in slurm.log(job), "the job is queued again", seconds=150)
    saved = max(records(run))
    assert (
        f"stopped after step {saved} (SIGUSR1); the same command resumes from {run}/"
        in slurm.log(job)
    )
    hasten(slurm, job)
    until(lambda: steps(run) > saved, "it goes on", seconds=60)
    slurm.run("scancel", job)
    assert f"resumed from {run}/global_step{saved}" in slurm.log(job)


def running_on_both(slurm, store, run):
    """Start an endless job; return (job, pid of rank 1 on n1, pid of its slurmstepd)."""
    more = ("--data-path", store, "--save", run, *FLAGS, "--train-iters", 1_000_000)
    job = slurm.submit("-N2", "launchers/pretrain.sbatch", *more)
    until(lambda: steps(run) >= 3, "three steps")
    ranks = [pid for pid, env in slurm.processes(job).items() if env.get("RANK") == "1"]
    rank = next(pid for pid in ranks if psutil.Process(pid).ppid() not in ranks)  # not its loader

    # the rank's parent is node.py, whose parent is slurmstepd
    return job, rank, psutil.Process(psutil.Process(rank).ppid()).ppid()


def test_a_killed_rank_ends_the_job_with_the_reason(slurm, store, tmp_path):
    job, rank, _ = running_on_both(slurm, store, tmp_path / "run")
    os.kill(rank, signal.SIGKILL)
    assert slurm.wait(job, seconds=60)["JobState"] == "FAILED", slurm.log(job)
    killed = f"error: rank 1 on n1 (pid {rank}) was killed by SIGKILL (memory ran out?)"
    assert killed in slurm.log(job)


def test_a_killed_slurmstepd_saves_and_queues_the_job_again(slurm, store, tmp_path):
    """Check that the node's ranks notice it, as Slurm itself does not."""
    job, rank, daemon = running_on_both(slurm, store, tmp_path / "run")
    os.kill(daemon, signal.SIGKILL)
    until(lambda: "it is queued again" in slurm.log(job), "the job is queued again", seconds=100)
    assert (
        "(SIGHUP: a terminal or a launcher has gone); the same command resumes from"
        in slurm.log(job)
    )
    until(lambda: not Path(f"/proc/{rank}").exists(), "nothing stays behind")
    assert list((tmp_path / "run").glob("global_step*/manifest.json"))
    slurm.run("scancel", job)


def test_wrong_use_is_said_in_the_log(slurm, store):
    job = slurm.submit(
        "-N2",
        "launchers/pretrain.sbatch",
        "--data-path",
        store,
        *FLAGS,
        "--tensor-model-parallel-size",
        3,
    )
    assert slurm.wait(job)["ExitCode"] == "2:0"
    assert "--tensor-model-parallel-size 3 does not divide the number of processes, 2" in slurm.log(
        job
    )
    assert "Traceback" not in slurm.log(job)


def test_other_files_and_what_would_run(slurm, store, tmp_path):
    """Check preflight on both nodes, an array of finetunings, `--print-launch`, and no Slurm."""
    job = slurm.submit("-N2", "launchers/preflight.sbatch", "--data-path", store, *FLAGS, "--fast")
    assert slurm.wait(job)["JobState"] == "COMPLETED", slurm.log(job)
    assert "ready" in slurm.log(job)
    flags = ("--data-path", store, "--model", "tiny", "--print-launch", "--save", f"{tmp_path}/%a")
    array = slurm.submit(
        "--array=7",
        f"--output={slurm.folder}/array-%a.log",
        "launchers/finetune.sbatch",
        "retrieval",
        *flags,
    )
    until(lambda: "data parallel" in slurm.log("array-7"), f"array {array}")
    assert f"--save {tmp_path}/7" in slurm.log("array-7")
    code, _, err = launch("bash", "launchers/pretrain.sbatch", "--model", "tiny")
    assert code == 2
    assert (
        "error: start this by sbatch; it would run: srun --kill-on-bad-exit=1 --wait=20"
        " --ntasks-per-node=1" in err
    )


ARRAY = """#!/usr/bin/env bash
. launchers/slurm.sh
# What is stopped is the last task, whose number is that of the whole array; the others have
# ended, or are still running.
srun() {
  echo $SLURM_ARRAY_TASK_ID >>STARTS
  [ "$SLURM_ARRAY_TASK_ID" = 3 ] && [ "$(grep -c 3 STARTS)" = 1 ] && sleep 4 && return 75
  [ "$SLURM_ARRAY_TASK_ID" = 2 ] && sleep 15
  return 0
}
run_on_nodes
"""


def test_a_stopped_task_of_an_array_is_queued_again_alone(slurm, tmp_path):
    starts = tmp_path / "starts"
    script = tmp_path / "array.sh"
    script.write_text(ARRAY.replace("STARTS", str(starts)))
    job = slurm.submit("--array=1-3", "-N1", "--requeue", "--open-mode=append", script)

    def states():
        text = slurm.run("squeue", "-h", "-j", job, "-o", "%K %T", check=False)
        return dict(line.split() for line in text.splitlines())

    until(
        lambda: (
            starts.exists()
            and starts.read_text().split().count("3")
            and states().get("3") == "PENDING"
        ),
        "queued again",
    )
    assert states().get("2") == "RUNNING", states()
    hasten(slurm, f"{job}_3")
    until(lambda: not states(), "all have ended")
    assert sorted(starts.read_text().split()) == ["1", "2", "3", "3"]


def test_nodes_prepare_data_together(slurm, tmp_path):
    """Check two tasks on each of two nodes, one of which is killed, against one process."""
    images = made_up_images(1500, features=64)
    (tmp_path / "x.tsv").write_text("".join(map(lxmert_line, images)))
    flags = (tmp_path / "x.tsv", "--images-per-shard", 10, "--workers", 1, "--claim-timeout", 5)
    build(tmp_path / "one", *flags)
    output = tmp_path / "two"
    command = ("-N2", "launchers/prepare.sbatch", "build-features", *flags, "--output", output)
    job = slurm.submit(*command, PROCESSES_PER_NODE="2")
    marks = tmp_path / "two.partial"
    until(lambda: len(list(marks.glob("shard-*.json"))) > 20, "some shards are there")
    tasks = [process for process in psutil.process_iter() if is_task(process, output)]
    assert tasks
    for task in tasks:
        task.kill()

    slurm.wait(job)
    assert content(output) == content(tmp_path / "one")


def is_task(process, output):
    """Check whether a process is the second task of node n1 that writes `output`."""
    try:
        mine = process.environ()
        words = process.cmdline()
    except psutil.Error:
        return False

    place = mine.get("SLURMD_NODENAME"), mine.get("SLURM_LOCALID")

    return place == ("n1", "1") and str(output) in words and "python" in words[0]
