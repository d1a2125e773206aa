"""Test the acceptance run itself, with a CPU in place of the GPU."""

import json
import os
import subprocess
import sys
import time
import zipfile

import psutil
import pytest
import torch

from megatron_interbert.parallel.device import NVIDIA_DRIVER
from tests.gpu.acceptance import BUDGET, STAGES, Stage, chosen, run_all
from tests.gpu.stages.place import Place, Record
from tests.gpu.stages.trace import summarise
from tests.launching import ENVIRONMENT, ROOT


def finds(place: Place, record: Record) -> None:
    """Pass, as a stage."""
    record.note(answer=42, many=[1, 2, 3])
    record.say("found the answer")


def fails(place: Place, record: Record) -> None:
    """Fail one expectation, then raise an exception."""
    record.expect(2 + 2 == 5, "two and two are not five")
    raise ValueError("and\nthis came of it")


def hangs(place: Place, record: Record) -> None:
    """Hang, as does a child in a session of its own."""
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    record.note(child=child.pid)
    time.sleep(600)


def dies(place: Place, record: Record) -> None:
    """Kill the stage's own process."""
    record.note(before=1)
    os.kill(os.getpid(), 9)


def own(function, seconds=60.0):
    return Stage(function.__name__, f"{__name__}:{function.__name__}", seconds, "of this test")


def test_a_failed_stage_is_named_and_the_others_go_on(tmp_path, capsys):
    output = tmp_path / "out" / "a.json"
    stages = [own(fails), own(hangs, 3.0), own(dies), own(finds)]
    assert not run_all(stages, output, pretend=True)

    report = json.loads(output.read_text())
    found = {stage["stage"]: stage for stage in report["stages"]}
    assert {name: stage["result"] for name, stage in found.items()} == {
        "fails": "FAILED",
        "hangs": "FAILED",
        "dies": "FAILED",
        "finds": "passed",
    }
    assert not report["passed"]
    assert report["pretended"]
    assert found["fails"]["failed"] == [
        "two and two are not five",
        "ValueError: and this came of it",
    ]
    assert found["hangs"]["failed"] == ["took longer than its 12 s"], "four times as long as a GPU"
    assert not psutil.pid_exists(found["hangs"]["figures"]["child"])
    assert found["dies"]["failed"] == ["killed by SIGKILL"]
    assert found["dies"]["figures"] == {"before": 1}
    assert found["finds"]["figures"] == {"answer": 42, "many": [1, 2, 3]}
    assert "this came of it" in (tmp_path / "out" / "a" / "fails.log").read_text()

    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [line["stage"] for line in lines] == ["fails", "hangs", "dies", "finds"]
    assert lines[-1]["figures"] == {"answer": 42}, "without long lists"
    table = printed[printed.index("PRETENDED") :]

    for words in (
        "FAILED  fails",
        "killed by SIGKILL",
        "passed  finds",
        "found the answer",
        "1 of 4 stages passed",
    ):
        assert words in table


def test_what_the_budget_leaves_no_time_for_is_named(tmp_path):
    output = tmp_path / "a.json"
    assert not run_all([own(finds), own(fails)], output, pretend=True, budget=1.0)
    failed = [stage["failed"] for stage in json.loads(output.read_text())["stages"]]
    assert failed == [["not run: the 1 s of all stages were used up"]] * 2


def wheel(folder):
    """Build the wheel of a one-line package."""
    folder.mkdir()

    with zipfile.ZipFile(folder / "of_a_wheel-1.0-py3-none-any.whl", "w") as file:
        file.writestr("of_a_wheel.py", "HERE = True\n")
        file.writestr(
            "of_a_wheel-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: of_a_wheel\nVersion: 1.0\n",
        )
        file.writestr(
            "of_a_wheel-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr("of_a_wheel-1.0.dist-info/RECORD", "")

    return folder


def run_script(*flags, **changes):
    environment = {**ENVIRONMENT, **changes}
    environment.pop("DS_ACCELERATOR")
    result = subprocess.run(
        ["bash", "tests/gpu/run.sh", *map(str, flags)],
        cwd=ROOT,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )

    return result.returncode, result.stdout, result.stderr


def test_stages_run_with_packages_from_wheels(tmp_path):
    """Run the command as without a package index; check exit code, table and JSON."""
    output = tmp_path / "a.json"
    before = subprocess.run(
        ["git", "status", "--short"], cwd=ROOT, capture_output=True, check=False
    ).stdout
    code, out, err = run_script(
        *("--pretend", "--stages", "machine,preflight", "--output", output),
        WHEELS=str(wheel(tmp_path / "wheels")),
    )
    assert code == 0, out + err
    report = json.loads(output.read_text())
    assert report["passed"]
    assert report["machine"]["torch"] == torch.__version__
    assert "card" not in report["machine"]
    assert [stage["stage"] for stage in report["stages"]] == ["machine", "preflight"]
    assert all(line.startswith("ok ") for line in report["stages"][1]["figures"]["lines"])
    assert "PRETENDED on the CPU" in out
    assert "2 of 2 stages passed" in out
    after = subprocess.run(
        ["git", "status", "--short"], cwd=ROOT, capture_output=True, check=False
    ).stdout
    assert after == before


@pytest.mark.skipif(
    NVIDIA_DRIVER.exists() or torch.cuda.is_available(), reason="there is a GPU here"
)
def test_wrong_use_is_one_line(tmp_path):
    cases = {
        "this machine shows no GPU": run_script(),
        "holds no wheels": run_script("--pretend", WHEELS=str(tmp_path)),
        "no such stage; there are machine": run_script(
            "--pretend", "--stages", "magic", WHEELS=str(wheel(tmp_path / "wheels"))
        ),
    }

    for words, (code, out, err) in cases.items():
        assert code == 2, out + err
        (line,) = err.strip().splitlines()
        assert line.startswith("error: ")
        assert words in line

    direct = subprocess.run(
        [sys.executable, "-m", "tests.gpu.acceptance"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert direct.returncode == 2
    assert direct.stderr.startswith("error: no GPU to accept: DS_ACCELERATOR is cpu")


def test_every_stage_is_there():
    """Check that names are unique, functions exist, and no stage may take half the budget."""
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    assert [stage.name for stage in chosen("zero, machine")] == ["machine", "zero"]

    for stage in STAGES:
        module, name = stage.function.split(":")
        assert (
            f"def {name}(place: Place, record: Record)"
            in (ROOT / f"{module.replace('.', '/')}.py").read_text()
        )
        assert stage.seconds < BUDGET / 2


def test_a_profile_tells_busy_time_and_launches():
    """Compare with a count of the microseconds in which anything ran."""
    spans = [(0, 10), (5, 12), (6, 8), (20, 21), (30, 45), (44, 46)]
    events = [
        {"ph": "X", "cat": "kernel", "name": f"k{number % 2}", "ts": begin, "dur": end - begin}
        for number, (begin, end) in enumerate(spans)
    ]
    others = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": 0, "dur": 100},
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 12, "dur": 50},
    ]
    found = summarise([*reversed(events), *others], steps=2)
    busy = {us for begin, end in spans for us in range(begin, end)}
    assert found["busy_ms"] == len(busy) / 1000 / 2
    assert found["launches"] == 3
    assert found["operations"] == 0.5
    assert found["top_ms"] == {"k0": 0.0135, "k1": 0.005}
    assert summarise(others, steps=1)["busy_ms"] == 0
