"""Run the stages of the acceptance run, each in a process with its own time limit.

A stage that fails or takes too long does not keep the others from running, and its findings so far
are kept: it writes them line by line.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.files import check_writable, write_json
from megatron_interbert.parallel.device import ACCELERATOR, gpus, why_no_gpu

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 600.0  # seconds for all stages together
LEFT_OVER = 5.0  # with fewer seconds left no stage is started
SLOWER = 4  # a pretended stage may take this many times as long
LOG_LINES = 15  # last lines shown of a failed stage's log


@dataclass(frozen=True)
class Stage:
    """Describe a stage: `function` (module:name) runs in a process for at most `seconds`."""

    name: str
    function: str
    seconds: float
    about: str


IN = "tests.gpu.stages"
STAGES = [
    Stage("machine", f"{IN}.machine:check_machine", 60, "versions; DeepSpeed steps one Linear"),
    Stage("attention", f"{IN}.attention:check_attention", 90, "attention kernels against float64"),
    Stage("kernels", f"{IN}.machine:run_gpu_tests", 120, "pytest -m gpu: kernels and twins"),
    Stage("stopping", f"{IN}.stopping:check_stopping", 75, "a rank too many; a stop, same bits"),
    Stage("preflight", f"{IN}.starting:check_preflight", 45, "preflight of base in bf16"),
    Stage("training", f"{IN}.training:measure_steps", 150, "steps of base; where time goes"),
    Stage("ratios", f"{IN}.training:measure_ratios", 75, "--fp8 and --kernels torch beside it"),
    Stage("zero", f"{IN}.zero:check_stages", 75, "ZeRO 2, 3, offload: resumed elsewhere"),
    Stage("memory", f"{IN}.starting:check_memory", 75, "--micro-batch-size auto; too little"),
    Stage("evaluation", f"{IN}.evaluation:check_evaluation", 90, "retrieval in fp32, bf16; VCR"),
]


def run_stage(
    stage: Stage, seconds: float, scratch: Path, log: Path, pretend: bool
) -> dict[str, Any]:
    """Run a stage for at most `seconds`; return {stage, result, seconds, said, failed, figures}."""
    record = scratch / f"{stage.name}.record"
    command = [
        *(sys.executable, "-m", "tests.gpu.stages", stage.function),
        *("--record", str(record), "--scratch", str(scratch)),
        *(["--pretend"] if pretend else []),
    ]
    began = time.monotonic()

    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(scratch, pretend),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)

    found = read_record(record)
    if code is None:
        found["failed"].append(f"took longer than its {seconds:.0f} s")
    elif code < 0:
        found["failed"].append(f"killed by {signal.Signals(-code).name}")
    elif code and not found["failed"]:
        found["failed"].append(last_line(log))

    return {
        "stage": stage.name,
        "result": "FAILED" if found["failed"] else "passed",
        "seconds": round(time.monotonic() - began, 1),
        **found,
    }


def environment(scratch: Path, pretend: bool) -> dict[str, str]:
    """Build a stage's environment: one GPU or none, and nothing compiled by an earlier run."""
    env = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCH_EXTENSIONS_DIR": str(scratch / "extensions"),
    }

    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        env.pop(name, None)

    if pretend:
        env |= {ACCELERATOR: "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return env | {"OMP_NUM_THREADS": "1"}  # several programs run at once

    return env | {"CUDA_VISIBLE_DEVICES": env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def end(process: subprocess.Popen) -> None:
    """Kill a stage that still runs, with all its descendants, in whatever session."""
    if process.poll() is not None:
        return

    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue

    process.wait()


def read_record(path: Path) -> dict[str, Any]:
    """Collect what a stage has written: lines for the table, failures, and figures."""
    found: dict[str, Any] = {"said": [], "failed": [], "figures": {}}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off: the process was killed

        found["said"] += entry.get("said", [])
        found["failed"] += entry.get("failed", [])
        found["figures"] |= entry.get("figures", {})

    return found


def last_line(log: Path) -> str:
    """Return the last line that a dead process logged."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "ended without a word"


def in_short(result: dict[str, Any]) -> str:
    """Format a result as one line of JSON, without lists and nested figures."""
    short = {n: v for n, v in result["figures"].items() if not isinstance(v, (list, dict))}
    return json.dumps({**result, "figures": short})


def table(results: Sequence[dict[str, Any]], about: dict[str, str]) -> str:
    """Format the results for people: one line per stage, and below it findings and failures."""
    lines = []

    for result in results:
        name = result["stage"]
        seconds = result["seconds"]
        lines.append(f"{result['result']:<8}{name:<12}{seconds:>6.1f} s  {about[name]}")
        lines += [f"{'':<12}{'':<16}  {text}" for text in result["said"]]
        lines += [f"{'':<12}{'FAILED':<16}  {text}" for text in result["failed"]]

    return "\n".join(lines)


def run_all(
    stages: Sequence[Stage],
    output: Path,
    pretend: bool,
    budget: float = BUDGET,
) -> bool:
    """Run the stages, write `output` after each, and return whether all passed.

    Their logs are in a folder named like `output`, without .json.
    """
    logs = output.with_suffix("")
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    report: dict[str, Any] = {
        "pretended": pretend,
        "date": time.strftime("%Y-%m-%d"),
        "machine": {},
        "stages": [],
    }
    results = report["stages"]
    began = time.monotonic()
    slower = SLOWER if pretend else 1

    with tempfile.TemporaryDirectory(prefix="acceptance-") as scratch:
        for stage in stages:
            left = budget * slower - (time.monotonic() - began)
            if left < LEFT_OVER:
                failed = [f"not run: the {budget:.0f} s of all stages were used up"]
                result = {"stage": stage.name, "result": "FAILED", "seconds": 0.0}
                result |= {"said": [], "failed": failed, "figures": {}}
            else:
                log = logs / f"{stage.name}.log"
                seconds = min(stage.seconds * slower, left)
                result = run_stage(stage, seconds, Path(scratch), log, pretend)
                if result["failed"]:
                    tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                    print(*(f"  | {line}" for line in tail), sep="\n", flush=True)

            print(in_short(result), flush=True)
            results.append(result)
            if stage.name == "machine":
                report["machine"] = result["figures"]

            report["seconds"] = round(time.monotonic() - began, 1)
            report["passed"] = all(r["result"] == "passed" for r in results)
            write_json(output, report)

    print()
    print(headline(report))
    print(table(results, {stage.name: stage.about for stage in stages}))
    passed = sum(result["result"] == "passed" for result in results)
    print(
        f"{passed} of {len(results)} stages passed in {report['seconds']:.0f} s:"
        f" {output}, logs in {logs}"
    )

    return report["passed"]


def headline(report: dict[str, Any]) -> str:
    """Describe the machine of the run in one line."""
    if report["pretended"]:
        return "PRETENDED on the CPU at tiny sizes: nothing here is a figure of a GPU"
    facts = report["machine"]
    names = ("card", "driver", "torch", "triton", "deepspeed")

    return ", ".join(f"{name} {facts[name]}" for name in names if name in facts)


def chosen(words: str) -> list[Stage]:
    """Return the stages that --stages names; UsageError for an unknown one."""
    if not words:
        return STAGES

    by_name = {stage.name: stage for stage in STAGES}
    names = [word.strip() for word in words.split(",")]
    for name in names:
        if name not in by_name:
            raise UsageError(f"--stages {name}: no such stage; there are {', '.join(by_name)}")

    return [stage for stage in STAGES if stage.name in names]


def check_gpu() -> None:
    """Raise UsageError if there is no GPU to run on."""
    if gpus():
        return

    asked = os.environ.get(ACCELERATOR)
    why = f"{ACCELERATOR} is {asked}" if asked else why_no_gpu() or "torch sees none"
    raise UsageError(
        f"no GPU to accept: {why}; mend that, or add --pretend to run every stage on the CPU"
        " at tiny sizes"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="bash tests/gpu/run.sh", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "runs" / "gpu" / "acceptance.json",
        help="JSON file (default: runs/gpu/acceptance.json)",
    )
    parser.add_argument("--stages", default="", help="only these, by commas; default: all of them")
    parser.add_argument(
        "--seconds",
        type=float,
        default=BUDGET,
        help="of all stages together (default: %(default)s)",
    )
    parser.add_argument(
        "--pretend", action="store_true", help="every stage on the CPU at tiny sizes"
    )
    arguments = parser.parse_args()
    if arguments.output.suffix != ".json":
        raise UsageError(f"--output {arguments.output}: expected a name that ends with .json")

    stages = chosen(arguments.stages)
    if not arguments.pretend:
        check_gpu()

    check_writable(arguments.output.parent, "--output")
    passed = run_all(stages, arguments.output, arguments.pretend, arguments.seconds)
    sys.stdout.flush()
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running stage is killed too
    run_entry(main)
