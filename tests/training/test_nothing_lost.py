"""Test that a run never starts from scratch where checkpoints were committed, and that bad state
never replaces good checkpoints.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_interbert.board import Board
from megatron_interbert.command_line import parse
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data import integrity
from megatron_interbert.errors import UsageError
from megatron_interbert.files import open_lock, point_to, sibling, write_text
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training import resume, run_folder
from megatron_interbert.training.checkpoint import NotFinite, check_finite
from megatron_interbert.training.deepspeed_config import agree_with_json
from megatron_interbert.training.metrics import MetricsWriter
from megatron_interbert.weights.manifest import complete_checkpoints, verify
from tests.corpus import write_store
from tests.launching import ENVIRONMENT, ROOT, TINY, launch, losses, start, until

PRETRAIN = (sys.executable, "-m", "megatron_interbert.pretrain")


def train(store, save, *more, **changes):
    """Return (exit code, stdout, stderr) of a short run that saves every third step."""
    flags = ("--data-path", store, "--save", save, "--save-interval", 3, "--num-workers", 0)
    return launch(*PRETRAIN, *TINY, *flags, *more, **changes)


def one_line(code, err, expected=2):
    assert code == expected, err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return (store, a run of 12 steps with checkpoints at 9 and 12)."""
    folder = tmp_path_factory.mktemp("made")
    store = write_store(folder / "store")
    code, out, err = train(store, folder / "run", "--train-iters", 12)
    assert code == 0, out + err

    return store, folder / "run"


@pytest.fixture
def run(made, tmp_path):
    """Copy the run, for a test to damage."""
    return shutil.copytree(made[1], tmp_path / "run", symlinks=True)


def names(run):
    return sorted(path.name for path in run.iterdir() if "global_step" in path.name)


def weights_of(run, step):
    return next((run / f"global_step{step}").glob("weights*"))


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def without_privilege(*command):
    """Run a command without root's exemption from file permissions."""
    ordinary = (
        ("setpriv", "--bounding-set", "-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    )
    done = subprocess.run(
        [*ordinary, *map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )

    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("what", ["weights", "manifest", "folder", "run"])
def test_what_cannot_be_read_is_not_damaged(made, run, what):
    """Check that nothing is renamed or started if weights, a manifest, a checkpoint or the whole
    run cannot be read.
    """
    forbidden = {
        "weights": [weights_of(run, 9), weights_of(run, 12)],
        "manifest": [run / "global_step12" / "manifest.json"],
        "folder": [run / "global_step12"],
        "run": [run],
    }[what]
    before = names(run)
    for path in forbidden:
        path.chmod(0o300 if what == "run" else 0)
    try:
        code, out, err = without_privilege(
            *(
                *PRETRAIN,
                *TINY,
                "--data-path",
                made[0],
                "--save",
                run,
                "--train-iters",
                15,
                "--num-workers",
                0,
            )
        )
    finally:
        for path in forbidden:
            path.chmod(0o755)

    assert "cannot be read (Permission denied)" in one_line(code, err)
    assert "train step" not in out
    assert names(run) == before
    assert verify(run / "global_step12") is None


def test_no_start_from_nothing_where_something_was_committed(made, run):
    """Check that a run refuses to start anew if all checkpoints are damaged or set aside, or only a
    pointer is left; but not because of the remains of a killed first save.
    """
    for step in (9, 12):
        flip(weights_of(run, step))
    for attempt in ("damaged now", "set aside before"):
        code, out, err = train(made[0], run, "--train-iters", 15)
        line = one_line(code, err)
        assert "no usable checkpoint is left there, but traces of earlier ones" in line, attempt
        assert "--resume never to start anew" in line
        assert "train step" not in out

    assert all(name.startswith("damaged-global_step") for name in names(run))

    for path in run.glob("damaged-*"):
        shutil.rmtree(path)

    (run / "latest").rename(run / "kept")
    (run / "best").unlink(missing_ok=True)
    code, out, err = train(made[0], run, "--train-iters", 15)
    assert "(latest_checkpointed_iteration.txt)" in one_line(code, err)
    (run / "kept").rename(run / "latest")
    assert "(best, latest" in one_line(
        *end_of(train(made[0], run, "--train-iters", 15))
    ) or "(latest" in one_line(*end_of(train(made[0], run, "--train-iters", 15)))
    code, out, err = train(made[0], run, "--train-iters", 4, "--resume", "never")
    assert code == 0, out + err
    assert "train step 1/" in out

    fresh = run.with_name("fresh")
    (fresh / ".global_step3.partial").mkdir(parents=True)
    code, out, err = train(made[0], fresh, "--train-iters", 3)
    assert code == 0, out + err
    assert names(fresh) == ["global_step3"]


def end_of(finished):
    return finished[0], finished[2]


def test_diverged_steps_push_nothing_out(made, run):
    """Check that a learning rate that ruins the weights leaves earlier checkpoints alone, and that
    the old rate can resume from them.
    """
    code, out, err = train(made[0], run, "--train-iters", 40, "--lr", 3e38)
    assert "the gradient was not finite for 10 steps in a row" in one_line(code, err, 1)
    assert verify(run / "global_step12") is None
    good = {path.name for path in complete_checkpoints(run)}
    assert "global_step9" in good
    assert not {"global_step15", "global_step18", "global_step21"} & good

    code, out, err = train(made[0], run, "--train-iters", 14, "--lr", 3e38)  # ends at a bad step
    assert "nothing is saved" in one_line(code, err, 1)
    assert {path.name for path in complete_checkpoints(run)} == good

    code, out, err = train(made[0], run, "--train-iters", 15)
    assert code == 0, out + err
    assert verify(run / "global_step15") is None
    assert all(math.isfinite(loss) for loss in losses(run)[15])


@pytest.mark.parametrize(
    "flags",
    [
        ("--lr", "inf"),
        ("--clip-grad", "nan"),
        ("--weight-decay=-inf",),
        ("--seed", "-1"),
        ("--min-lr", "1e999"),
        ("--seed", str(1 << 64)),
    ],
)
def test_flags_that_are_no_numbers_are_refused(flags):
    with pytest.raises(UsageError, match=flags[0].split("=")[0]):
        parse(RunConfig, "", flags).check()


@pytest.mark.parametrize(
    "text", ["lr: .inf", "lr: .nan", "- lr", "seed: -5", "lr: 1e999", "lr", "1: [2"]
)
def test_settings_of_files_are_checked_as_flags_are(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"run\.yaml"):
        parse(RunConfig, "", ["--config", str(tmp_path / "run.yaml")]).check()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1e999"])
def test_deepspeed_json_with_numbers_that_are_none(tmp_path, number):
    (tmp_path / "ds.json").write_text('{"gradient_clipping": NUMBER}'.replace("NUMBER", number))
    config = parse(RunConfig, "", ["--deepspeed_config", str(tmp_path / "ds.json")])
    with pytest.raises(UsageError, match=r"ds\.json"):
        agree_with_json(config)


def test_state_that_is_not_finite_is_not_saved():
    """Check NaN and infinity anywhere; large values whose sum overflows float32 are fine."""
    check_finite("large", torch.full((1000,), 3e38))
    check_finite("empty", torch.zeros(0))
    for bad in (math.nan, math.inf, -math.inf):
        tensor = torch.zeros(3, 50)
        tensor[2, 49] = bad
        with pytest.raises(NotFinite, match="layer has elements that are not finite"):
            check_finite("layer", tensor)


def test_a_run_ends_when_a_save_has_met_infinity(made, tmp_path):
    """Check that a run ends soon after such a save: what it trained further would be lost."""
    rate = ("--lr", 3e38, "--lr-warmup-fraction", 0)
    flags = ("--train-iters", 2000, "--save-interval", 1, "--max-bad-steps", 1000)
    code, out, err = train(made[0], tmp_path / "run", *rate, *flags)
    assert "elements that are not finite and is not saved: the run has diverged" in one_line(
        code, err, 1
    )
    assert not names(tmp_path / "run")
    assert "train step 100/" not in out


def test_metrics_never_stop_a_run(made, run):
    """Check that bad lines, a folder in place of the file, or a file in place of TensorBoard's
    folder give a note, and training continues.
    """
    records = run / "metrics.jsonl"
    odd = ["123", '{"step": "x"}', "[1]", "half a li", '"step"', "\ufffd"]
    records.write_text("".join(line + "\n" for line in odd) + records.read_text() + '{"step": 12')
    code, out, err = train(made[0], run, "--train-iters", 13)
    assert code == 0, out + err
    assert "metrics.jsonl: 6 lines were not records and are dropped" in out
    assert [json.loads(line)["step"] for line in records.read_text().splitlines()] == list(
        range(1, 14)
    )

    records.unlink()
    records.mkdir()
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("not a folder")
    code, out, err = train(made[0], run, "--train-iters", 15)
    assert code == 0, out + err
    assert "Traceback" not in err
    assert out.count("metrics.jsonl cannot be written (Is a directory); training continues") == 1
    assert out.count("cannot be written (File exists); training continues") == 1
    assert verify(run / "global_step15") is None


def test_a_pipe_in_place_of_a_file_holds_nothing_up(made, run):
    """Check that pipes are not opened: reading one would never end."""
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    code, out, err = train(made[0], run, "--train-iters", 13, timeout=60)
    assert code == 0, out + err
    assert "metrics.jsonl cannot be written (is not a regular file); training continues" in out

    (run / "global_step13" / "manifest.json").unlink()
    os.mkfifo(run / "global_step13" / "manifest.json")
    code, out, err = train(made[0], run, "--train-iters", 13, timeout=60)
    assert "manifest.json: cannot be read (is not a regular file)" in one_line(code, err)


def test_event_files_come_back_with_the_folder(tmp_path):
    board = Board(tmp_path / "tensorboard", 0)
    board.write(1, "train", {"loss": 1.0})
    shutil.rmtree(tmp_path / "tensorboard")
    board.write(2, "train", {"loss": 1.0})
    assert board.path.read_bytes().count(b"loss") == 1


def test_metrics_are_written_again_when_the_disk_has_room(tmp_path, capsys):
    """Check a full disk (/dev/full), then a new file: no record is cut, and each change is reported
    once.
    """
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(str(tmp_path), "", True, 10, 0)
    writer.sinks[0]._begun = True  # otherwise it would replace the link by a file
    for step in (1, 2):
        writer.write(step, {"loss": 1.0}, "loss 1")

    (tmp_path / "metrics.jsonl").unlink()
    for step in (3, 4):
        writer.write(step, {"loss": math.nan}, "loss")

    told = capsys.readouterr().out
    assert (
        told.count("metrics.jsonl cannot be written")
        == told.count("metrics.jsonl can be written again")
        == 1
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(3, None), (4, None)]


def test_output_that_nobody_can_store_does_not_end_a_run(made, tmp_path):
    """Redirect standard output to a full disk."""
    command = [
        *PRETRAIN,
        *TINY,
        "--data-path",
        made[0],
        "--save",
        tmp_path / "save",
        "--train-iters",
        3,
        "--num-workers",
        0,
    ]

    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=200,
        )

    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "save" / "global_step3") is None


def test_a_folder_that_is_removed_while_a_run_writes(made, tmp_path):
    """Check that there are no tracebacks, and that the next checkpoint recreates the folder."""
    save = tmp_path / "save"
    process = start(
        *(
            *PRETRAIN,
            *TINY,
            "--data-path",
            made[0],
            "--save",
            save,
            "--save-interval",
            3,
            "--train-iters",
            60,
            "--num-workers",
            0,
        )
    )
    until(lambda: (save / "global_step3").exists(), "a checkpoint is there")
    shutil.rmtree(save, ignore_errors=True)
    out, err = process.communicate(timeout=200)
    assert "Traceback" not in err + out
    assert process.returncode in (0, 1), err
    if process.returncode == 0:
        assert verify(save / "global_step60") is None
        assert "process" in (save / ".lock").read_text(), "it is locked again"


def test_links_in_a_shared_folder_are_not_followed(made, run, tmp_path):
    """Check that a planted lock or pointer cannot redirect writes to another file, and that `best`
    cannot point outside the folder.
    """
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (run / ".lock").unlink()
    os.symlink(victim, run / ".lock")
    assert "expected a lock file, found something else" in one_line(
        *end_of(train(made[0], run, "--train-iters", 15))
    )
    (run / ".lock").unlink()
    os.link(victim, run / ".lock")  # as in a hard-linked backup: locked, but not written to

    for name in (
        "latest.partial",
        "metrics.jsonl.partial",
        "latest_checkpointed_iteration.txt.partial",
    ):
        (run / name).symlink_to(victim)

    code, out, err = train(made[0], run, "--train-iters", 15)
    assert code == 0, out + err
    assert victim.read_text() == "mine"
    assert (run / "latest").read_text() == "global_step15"

    elsewhere = shutil.copytree(run / "global_step15", tmp_path / "elsewhere")
    for target in (elsewhere, Path("..") / "elsewhere", Path(".")):
        point_to(run / "best", str(target))
        with pytest.raises(UsageError, match="expected a folder beside it"):
            sibling(run / "best")

    point_to(run / "best", "global_step15")
    assert sibling(run / "best") == run / "global_step15"


def test_a_lock_and_a_text_stay_what_they_are(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(UsageError, match="expected a lock file"):
            os.close(open_lock(tmp_path / name))

    write_text(tmp_path / "text", "half \udce4 of a name")
    assert json.loads('"' + (tmp_path / "text").read_text() + '"') == "half \udce4 of a name"


def test_without_locks_nothing_of_another_run_is_renamed(made, run, monkeypatch, capsys):
    """Check on a disk without locks (ENOLCK) that the run says so, does not rename damaged
    checkpoints, and prunes none of another run.
    """

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("megatron_interbert.files.fcntl.lockf", no_locks)
    state = ParallelState()
    claim = run_folder.claim_folder(str(run), state)
    assert not claim.locked
    said = capsys.readouterr().out
    assert "cannot be locked (No locks available): this run renames and" in said

    flip(weights_of(run, 12))
    (run / ".global_step15.other.partial").mkdir()
    config = type("Config", (), {"save": str(run), "load": "", "resume": "auto"})
    before = names(run)
    assert resume.find_checkpoint(config, state, claim.locked) == run / "global_step9"
    assert names(run) == before

    shutil.rmtree(run / "global_step12")
    shutil.copytree(made[1] / "global_step12", run / "global_step12")
    ours = run_folder.RunFolder(run, claim, "ours", print)
    ours.prune(run / "global_step99", "", keep_last=1, keep_every=0)
    assert names(run) == before, "the other run's are not ours to prune"


@pytest.mark.parametrize("locked", [False, True])
def test_a_checkpoint_of_another_run_keeps_its_name(run, locked):
    """Check that its name is not taken, even by the holder of the lock."""
    ours = run_folder.RunFolder(run, run_folder.Claim(locked=locked), "ours", print)
    work = ours.partial(run / "global_step12")
    work.mkdir()
    with pytest.raises(UsageError, match="already exists and is not of this run; if two runs"):
        ours.publish(work, run / "global_step12")

    assert verify(run / "global_step12") is None


def test_damage_that_rank_0_does_not_see_is_no_damage(run, monkeypatch):
    """Check that, if one machine lacks a mount or sees an outdated disk, nothing is renamed and the
    machine is named.
    """

    class Two(ParallelState):
        """Simulate rank 0 of two, of which the other does not see a file."""

        def gather(self, value, group=None):
            if (
                isinstance(value, tuple)
                and value[0] is None
                and isinstance(value[1], str)
                and not asking
            ):
                return [value, ("weights are missing", "node-b")]

            return [value, value]

    asking = []
    state = Two()
    monkeypatch.setattr(resume, "together", lambda state, action: action())
    before = names(run)

    with pytest.raises(
        UsageError, match=r"as node-b sees it, but not as .* disk that all machines share"
    ):
        resume.newest_sound([run / "global_step12"], state, rename=True)

    assert names(run) == before


def test_a_store_that_was_only_moved_or_given_away_is_not_hashed_before_work(tmp_path, monkeypatch):
    """Check that other permissions, with times kept, have a store verified in the background, but
    other times before the work, unless it is large.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(integrity, "SMALL", 0)
    store = write_store(tmp_path / "store")
    first = integrity.Integrity([store])
    assert not first._at_once
    first.start()
    first.wait(60)
    assert not first.problem
    assert not integrity.Integrity([store])._beside

    for file in store.iterdir():
        file.chmod(0o600)

    again = integrity.Integrity([store])
    assert len(again._beside) > 2
    assert not again._at_once
    os.utime(store / "captions.h5")
    assert [file.path.name for _, file in integrity.Integrity([store])._at_once] == ["captions.h5"]

    heard = []
    flip(store / "shard-00000.h5")
    os.utime(store / "shard-00000.h5", (1, 1))
    monkeypatch.setattr(integrity, "LARGE", 0)
    large = integrity.Integrity([store])
    large.start(heard.append)
    large.wait(60)
    assert heard == [large.problem]
    assert "shard-00000.h5: sha256 differs" in large.problem


def test_a_copied_run_is_pruned_as_before(made, tmp_path):
    """Check a copy by `cp -rL`, where `best` is a folder instead of a link, with a hard-linked
    backup that shares the lock file.
    """
    run = shutil.copytree(made[1], tmp_path / "run")
    shutil.copytree(run / "global_step9", run / "best")
    subprocess.run(["cp", "-al", run, tmp_path / "backup"], check=True)
    code, out, err = train(made[0], run, "--train-iters", 15)
    assert code == 0, out + err
    assert names(run) == ["global_step12", "global_step15"]
    assert "process" in (tmp_path / "backup" / ".lock").read_text()


@pytest.mark.parametrize("spoil", ["features", "captions", "labels"])
def test_data_that_have_changed_in_place_are_named(tmp_path, spoil):
    """Check that, after features, a caption or labels are overwritten, a run whose data were
    verified before stops at the start and names the file.
    """
    import h5py

    store = write_store(tmp_path / "store")
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    code, out, err = train(store, tmp_path / "save", "--train-iters", 3, **home)
    assert code == 0, out + err
    assert list((tmp_path / "cache").rglob("*.json")), "what was verified is remembered"

    name = "captions.h5" if spoil == "captions" else "shard-00001.h5"
    with h5py.File(store / name, "r+") as file:
        if spoil == "captions":
            file["text"][5] ^= 1
        elif spoil == "features":
            file["image_features"][:, 3] = 60000
        else:
            file["class_probs"][0] = file["class_probs"][0][::-1]

    code, out, err = train(store, tmp_path / "save", "--train-iters", 6, **home)
    line = one_line(code, err)
    assert f"{name}: sha256 differs" in line
    assert "train step" not in out
    assert names(tmp_path / "save") == ["global_step3"]


def test_names_and_locales_of_all_kinds(tmp_path):
    """Check a comma in a store's path, an ASCII locale, and Chinese characters in paths."""
    store = write_store(tmp_path / "一, 二")
    posix = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, out, err = train(store, tmp_path / "运行", "--train-iters", 3, **posix)
    assert code == 0, out + err
    assert "Traceback" not in err
    code, out, err = train(store, tmp_path / "运行", "--train-iters", 4)
    assert code == 0, out + err
    assert "train step 4/4" in out
    code, out, err = train("a,b", tmp_path / "no", "--train-iters", 3)
    assert "separate several with commas" in one_line(code, err)
