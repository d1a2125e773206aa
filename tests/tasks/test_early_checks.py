"""Test that faults of an evaluation or a finetuning run are reported before any work."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_interbert.command_line import read_options
from megatron_interbert.commands import shop_report
from megatron_interbert.errors import Unreadable, UsageError
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.reading import list_folder
from megatron_interbert.tasks import loading
from megatron_interbert.tasks.config import EvaluateConfig
from megatron_interbert.tasks.multitask.job import check_alike, known_detector
from megatron_interbert.tasks.retrieval.config import EvaluateRetrievalConfig
from megatron_interbert.tasks.retrieval.evaluation import evaluate_retrieval
from megatron_interbert.tasks.shop.config import EvaluateProductSearchConfig
from megatron_interbert.tasks.shop.evaluation import evaluate_product_search
from megatron_interbert.tasks.task import Job
from megatron_interbert.tasks.vcr.config import EvaluateVcrConfig
from megatron_interbert.tasks.vcr.evaluation import evaluate_vcr
from tests.corpus import write_store
from tools.studies import ablate

EVALUATIONS = (
    (EvaluateRetrievalConfig, evaluate_retrieval),
    (EvaluateVcrConfig, evaluate_vcr),
    (EvaluateProductSearchConfig, evaluate_product_search),
)


@pytest.mark.parametrize(("config_class", "evaluate"), EVALUATIONS)
@pytest.mark.parametrize("name", ["photo.jpg", "nowhere"])
def test_photos_come_from_a_folder(
    tmp_path: Path, config_class: type[EvaluateConfig], evaluate: object, name: str
) -> None:
    """Check this before the weights are opened (there are none here)."""
    (tmp_path / "photo.jpg").write_bytes(b"x")
    config = config_class(image_folder=str(tmp_path / name))
    with pytest.raises(UsageError, match=f"--image-folder {tmp_path / name}: no such folder"):
        evaluate(config, ParallelState(), torch.device("cpu"))


def test_a_folder_that_cannot_be_listed_is_no_folder_without_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading.check_photos(str(tmp_path), ParallelState())

    def no_right(folder: Path) -> list[str]:
        raise Unreadable(f"{folder}: cannot be read (Permission denied)")

    monkeypatch.setattr(loading, "list_folder", no_right)
    assert list_folder(tmp_path) == []
    with pytest.raises(UsageError, match="Permission denied"):
        loading.check_photos(str(tmp_path), ParallelState())


def test_a_metric_is_a_figure_of_the_task() -> None:
    """Check this even if there is no data to evaluate on."""
    parts = dict.fromkeys(("task", "samples", "model_config", "heads", "data", "vocabulary"))
    Job(**parts, metric="q_ar", figures=("q_a", "qa_r", "q_ar"))
    Job(**parts)

    with pytest.raises(
        UsageError,
        match=r"--metric q_aa \(did you mean 'q_ar?'\?\): expected one of q_a, qa_r, q_ar",
    ):
        Job(**parts, metric="q_aa", figures=("q_a", "qa_r", "q_ar"))


def test_tasks_of_one_run_have_features_of_one_detector() -> None:
    """Give features of one backbone on two grids; unknown ones, first or in between; and others
    if they are allowed.
    """
    strict = SimpleNamespace(task_flags="t.yaml", allow_other_detector=False)

    def job(detector: dict[str, str] | None) -> Job:
        data = {"vocabulary": "v", "detector": detector}
        parts = dict.fromkeys(("task", "samples", "model_config", "heads", "vocabulary"))
        return Job(**parts, data=data, leave_out=list)

    jobs = {
        "vqa": job({"name": "clip", "revision": "1", "grid": "7x7"}),
        "gqa": job({"name": "clip", "revision": "1", "grid": "14x14"}),
    }
    with pytest.raises(
        UsageError,
        match=r"t.yaml: gqa, unlike vqa: features of clip \(grid 14x14\), expected those of clip"
        r" \(grid 7x7\)",
    ) as refused:
        check_alike(strict, jobs)

    for names in (("nlvr2", "vqa", "gqa"), ("vqa", "nlvr2", "gqa")):
        with pytest.raises(UsageError) as again:
            check_alike(strict, {name: jobs.get(name, job(None)) for name in names})
        assert str(again.value) == str(refused.value)

    check_alike(strict, {"vqa": jobs["vqa"], "nlvr2": job(None)})
    check_alike(strict, {"vqa": job(None), "nlvr2": job(None)})
    check_alike(SimpleNamespace(task_flags="", allow_other_detector=True), jobs)


def test_known_detector() -> None:
    """Expect the first one that is known, which a checkpoint then records."""
    found = {"vqa": None, "gqa": {"name": "a"}, "nlvr2": {"name": "b"}}
    jobs = {task: SimpleNamespace(data={"detector": found[task]}) for task in found}
    assert known_detector(jobs) == ("gqa", {"name": "a"})
    assert known_detector({"vqa": jobs["vqa"]}) == ("", None)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--jobs", "0"), "--jobs is 0, expected 1 or more"),
        (("--train-iters", "-1"), "--train-iters is -1, expected 1 or more"),
        (
            ("--pretrain-flags", "'"),
            "--pretrain-flags: No closing quotation; expected flags as in a shell",
        ),
    ],
)
def test_an_ablation_needs_numbers_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], line: str
) -> None:
    store = str(write_store(tmp_path / "store"))
    places = ("--data-path", store, "--test-data-path", store, "--output", str(tmp_path / "out"))
    monkeypatch.setattr("sys.argv", ["ablate.py", *places, "--only", "full", *flags])
    with pytest.raises(UsageError) as caught:
        ablate.run(read_options(ablate.Options))

    assert str(caught.value) == line
    assert not (tmp_path / "out").exists()


def test_a_report_needs_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check this before the runs are opened (there are none here)."""
    monkeypatch.setattr("sys.argv", ["shop_report.py", "--search", "x", "--output", str(tmp_path)])
    with pytest.raises(UsageError, match="is a folder, expected a file to write"):
        shop_report.run(read_options(shop_report.Options))

    monkeypatch.setattr("sys.argv", ["shop_report.py", "--search", "x", "--two-stage", "-1"])
    with pytest.raises(UsageError, match="--two-stage is -1, expected 0 or more"):
        shop_report.run(read_options(shop_report.Options))
