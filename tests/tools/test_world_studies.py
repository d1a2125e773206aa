"""Test the studies of a generated world: the flags of their stages, tables, what is refused."""

import itertools
import json
from pathlib import Path

import pytest

from megatron_interbert.command_line import read_options
from megatron_interbert.config.yaml_file import flags_of
from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_json
from megatron_interbert.tasks.registry import REGISTRY
from tests.corpus import write_store
from tools.studies import ablate_tasks, compare_tasks
from tools.studies.stages import Stages
from tools.studies.world_tasks import one_sided, tasks_of


def test_flags_of_tasks_are_those_of_the_program(tmp_path):
    """Read the flags of each task by the options of its finetuning and evaluation."""
    every = {**tasks_of(tmp_path), **one_sided(tmp_path)}
    assert len(every) == 12
    for name, task in every.items():
        row = REGISTRY[task.command]
        for kind, flags in (
            (row.config, task.training()),
            (row.evaluate_config, task.evaluation()),
        ):
            flags_of(kind, {k.replace("-", "_"): v for k, v in flags.items()}, name)
            assert "SPLIT" not in " ".join(flags.values())

    assert tasks_of(Path("w"))["refcoco"].evaluation()["split"] == "val"
    assert tasks_of(Path("w"))["refcoco"].evaluation()["data-path"] == "w/test"
    assert tasks_of(Path("w"))["nlvr2"].evaluation()["data-path"] == "w/nlvr2/dev"


@pytest.fixture
def world(tmp_path):
    """Write the stores of a world."""
    for split in ("train", "test"):
        write_store(tmp_path / "world" / split, images=12)
    return tmp_path / "world"


@pytest.fixture
def called(monkeypatch):
    """Let stages write what a training or an evaluation would; return what was called."""
    calls = []

    def call(self, entry, *flags):
        words = [str(flag) for flag in flags]
        given = dict(itertools.pairwise(words))
        calls.append([str(entry), *words])
        if entry == "evaluate":
            folder = Path(given["--output"])
            folder.mkdir(parents=True)
            seed = int(str(folder).split("seed-")[1][0])
            shown = 70.0 + seed - 5 * ("no-msm" in str(folder))
            names = ("accuracy", "accuracy_gt", "R@1_det", "t2i_R@1")
            beside = [{"figures": {"accuracy": 33.0}}, {"figures": {"accuracy": 31.0}}]
            result = {"metrics": dict.fromkeys(names, shown), "beside": beside}
            write_json(folder / "result.json", result)
        else:
            last = Path(given["--save"]) / f"global_step{given['--train-iters']}"
            last.mkdir(parents=True)
            (last / "manifest.json").write_text("{}")

    monkeypatch.setattr(Stages, "call", call)
    return calls


def run(monkeypatch, tool, *flags):
    """Run a study by its flags."""
    monkeypatch.setattr("sys.argv", ["tool", *map(str, flags)])
    tool.run(read_options(tool.Options))


def test_tasks_alone_and_together(world, called, monkeypatch, tmp_path, capsys):
    flags = ("--world", world, "--output", tmp_path / "out", "--only", "vqa,nlvr2")
    run(monkeypatch, compare_tasks, *flags, "--seeds", "1,2", "--train-iters", 7)
    table = (tmp_path / "out" / "tasks.md").read_text()
    assert "| vqa | accuracy | 33.0 | 71.5 ± 0.7 | 71.5 ± 0.7 |" in table
    together = [call for call in called if "multitask" in call]
    assert len(together) == 2
    assert together[0][together[0].index("--train-iters") + 1] == "14"
    assert len(called) == 2 * (1 + 2 * 2 + 1 + 2)

    called.clear()
    run(monkeypatch, compare_tasks, *flags, "--seeds", "1,2", "--train-iters", 7)
    assert not called, "nothing is made twice"
    with pytest.raises(UsageError, match="made with other options than now"):
        run(monkeypatch, compare_tasks, *flags, "--seeds", "1,2", "--train-iters", 8)
    with pytest.raises(UsageError, match="all: made with other options than now"):
        run(monkeypatch, compare_tasks, *flags[:-1], "vqa,gqa", "--train-iters", 7)
    with pytest.raises(UsageError, match="unknown 'vqb'"):
        run(monkeypatch, compare_tasks, *flags[:-1], "vqb")

    less = ("--output", tmp_path / "less", "--seeds", "1", "--train-iters", 7)
    run(monkeypatch, compare_tasks, *flags, *less, "--together-iters", 5)
    (together,) = [call for call in called if "multitask" in call]
    assert together[together.index("--train-iters") + 1] == "5"
    assert "7 of finetuning on a task, 5 on all at once, 64 samples" in (
        (tmp_path / "less" / "tasks.md").read_text()
    )

    with pytest.raises(UsageError, match="--together-iters: nothing is trained at once"):
        run(monkeypatch, compare_tasks, *flags, "--no-together", "--together-iters", 5)

    called.clear()
    one = ("--only", "vqa", "--output", tmp_path / "one", "--seeds", "1")
    run(monkeypatch, compare_tasks, *flags[:2], *one)
    assert not [call for call in called if "multitask" in call]
    assert "| vqa | accuracy | 33.0 | 71.0 |  |" in (tmp_path / "one" / "tasks.md").read_text()


def test_parts_left_out(world, called, monkeypatch, tmp_path):
    flags = ("--world", world, "--output", tmp_path / "out", "--images", 5)
    run(monkeypatch, ablate_tasks, *flags, "--only", "full,no-msm", "--tasks", "vqa+nlvr2,rte")
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert "| variant | t2i R@1 | vqa | nlvr2 | rte |" in table
    assert "| everything | 72.0 ± 1.0 |" in table
    assert "| without masked segments | 67.0 ± 1.0 (-5.0, 3 of 3) |" in table
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())["results"]
    assert [figures["rte"] for figures in found["full"]] == [71.0, 72.0, 73.0]
    images = (tmp_path / "out" / "images.txt").read_text().split()
    assert len(images) == 5
    searches = [call for call in called if "retrieval" in call]
    assert all("--zero-shot" in call and "--images" in call for call in searches)

    with pytest.raises(UsageError, match="retrieval: made with other options than now"):
        run(monkeypatch, ablate_tasks, *flags[:-1], 6, "--only", "full", "--tasks", "vqa+nlvr2,rte")
    run(
        *(monkeypatch, ablate_tasks, *flags[:2], "--output", tmp_path / "more", "--images", 500),
        *("--only", "full", "--tasks", "vqa", "--seeds", "1"),
    )
    assert "among 12 scenes" in (tmp_path / "more" / "ablation.md").read_text()

    with pytest.raises(UsageError, match=r"no hard_negatives.npy"):
        run(monkeypatch, ablate_tasks, *flags, "--only", "full,no-hard-negatives")
    with pytest.raises(UsageError, match=r"no region store train/ there"):
        run(monkeypatch, ablate_tasks, "--world", tmp_path, "--output", tmp_path / "x")


def test_signs_are_counted_by_seed():
    assert ablate_tasks.change([-1.0, -2.0, 0.5]) == "-0.8, 2 of 3"
    assert ablate_tasks.change([0.0, 0.0]) == "+0.0, 0 of 2"
