"""Test the paper's ablation as one command: from runs to the table, and what does not count as a
result.
"""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest

from megatron_interbert.command_line import read_options
from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_json
from tests.corpus import write_store
from tests.launching import launch
from tools.studies import ablate
from tools.studies.options import Options
from tools.studies.variant_run import Run, Variant


def test_ablation_from_runs_to_table(tmp_path, monkeypatch):
    """Run a variant with one seed and two steps; repeat, which finds it done; wrong use."""
    store = write_store(tmp_path / "s", images=70)
    command = (
        sys.executable,
        "tools/ablate.py",
        "--data-path",
        store,
        "--test-data-path",
        store,
        "--output",
        tmp_path / "out",
        "--model",
        "tiny",
        "--train-iters",
        2,
        "--finetune-iters",
        2,
        "--batch-size",
        8,
        "--jobs",
        2,
    )
    code, out, err = launch(*command, "--seeds", "5", "--only", "no-streams")
    assert code == 0, out + err
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())["results"]
    assert found.keys() == {"no-streams"}
    assert "interaction module only, no streams" in (tmp_path / "out" / "ablation.md").read_text()
    model = json.loads((tmp_path / "out" / "no-streams" / "seed-5" / "model.json").read_text())
    assert (model["interaction_layers"], model["text_layers"], model["image_layers"]) == (3, 0, 0)
    before = (
        (tmp_path / "out" / "no-streams" / "seed-5" / "pretrained" / "metrics.jsonl")
        .stat()
        .st_mtime_ns
    )
    code, again, _ = launch(*command, "--seeds", "5", "--only", "no-streams")
    assert (code, again) == (0, out)
    assert (
        tmp_path / "out" / "no-streams" / "seed-5" / "pretrained" / "metrics.jsonl"
    ).stat().st_mtime_ns == before

    for flags, words in (
        (
            ("--only", "no-streams", "--finetune-flags", "--lr 1e-4"),
            "made with other options than now",
        ),
        (("--only", "no-strems"), "did you mean 'no-streams'"),
        (("--only", "no-hard-negatives"), "no hard_negatives.npy"),
        (("--only", "full", "--seeds", "a"), "--seeds is 'a'"),
    ):
        monkeypatch.setattr("sys.argv", [*map(str, command[1:]), "--seeds", "5", *flags])
        with pytest.raises(UsageError, match=re.escape(words)):
            ablate.run(read_options(Options))


FIGURES = {"t2i_R@1": 9.0, "i2t_R@1": 8.0}


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Return a run of one variant whose training and evaluations, and the options recorded for
    them, exist.
    """
    monkeypatch.setattr(
        "sys.argv",
        [
            "ablate.py",
            "--data-path",
            "a",
            "--test-data-path",
            "b",
            "--output",
            str(tmp_path),
            "--model",
            "tiny",
            "--train-iters",
            "2",
            "--finetune-iters",
            "2",
        ],
    )
    options = read_options(Options)
    run = Run("full", Variant("everything"), 5, options)

    def call(entry, *flags):
        given = dict(itertools.pairwise(flags))
        if entry == "evaluate":
            Path(given["--output"]).mkdir()
            write_json(Path(given["--output"]) / "result.json", {"metrics": FIGURES})
        else:
            (Path(given["--save"]) / "global_step2").mkdir(parents=True)
            (Path(given["--save"]) / "global_step2" / "manifest.json").write_text("{}")
            (Path(given["--save"]) / "metrics.jsonl").write_text('{"step": 2, "split": "train"}\n')

    monkeypatch.setattr(run.stages, "call", call)
    run.results()
    monkeypatch.setattr(run.stages, "call", lambda *flags: pytest.fail("nothing is to be made"))
    assert run.results()["finetuned"] == FIGURES

    return run


@pytest.mark.parametrize(
    "record",
    ["model.json", "pretrained.flags.json", "finetuned.flags.json", "finetuned/result.flags.json"],
)
def test_results_of_unknown_options_are_not_taken(finished, record):
    (finished.folder / record).unlink()
    with pytest.raises(
        UsageError,
        match="is missing, which records the options it was made with; choose another --output",
    ):
        finished.results()

    assert not (finished.folder / record).exists(), "it is not made up"


@pytest.mark.parametrize("metrics", [{}, [], None, {"t2i_R@1": "9", "i2t_R@1": 8.0}])
def test_a_result_without_its_figures_is_one_line(finished, metrics):
    """Check at the end, when only the table remains to be made."""
    write_json(finished.folder / "finetuned" / "result" / "result.json", {"metrics": metrics})
    with pytest.raises(UsageError, match=r"result\.json: expected the figures t2i_R@1, i2t_R@1"):
        finished.results()


def test_a_pretraining_without_metrics_is_one_line(finished):
    (finished.folder / "pretrained" / "metrics.jsonl").write_text('{"step": 2, "spl')
    with pytest.raises(UsageError, match="expected the metrics of a pretraining, found none"):
        finished.results()


def test_results_of_another_model_are_not_taken(finished):
    finished.options.model = "sample"
    with pytest.raises(
        UsageError, match=r"pretrained: made with other options than now \(model.json\)"
    ):
        finished.results()
