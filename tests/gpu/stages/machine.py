"""Describe the machine, check that DeepSpeed starts on it, and run the tests that need a GPU."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from megatron_interbert.kernels.fit import gpu_of
from megatron_interbert.training.peaks import peak_of
from tests.gpu.stages.place import Place, Record
from tests.gpu.stages.programs import Program

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "h5py", "numpy", "tokenizers")
COMPILERS = (("gcc", "--version"), ("nvcc", "--version"), ("ninja", "--version"))


def check_machine(place: Place, record: Record) -> None:
    """Record versions, driver, compilers; check that DeepSpeed steps a Linear without compiling."""
    record.note(python=platform.python_version(), system=platform.platform(), cores=os.cpu_count())

    for name in PACKAGES:
        try:
            record.note(**{name: importlib.metadata.version(name)})
        except importlib.metadata.PackageNotFoundError:
            record.note(**{name: None})

    for command in COMPILERS:
        record.note(**{command[0]: first_version(command)})
    if not place.pretended:
        note_card(record)

    step_one_linear(place, record)


def first_version(command: tuple[str, ...]) -> str | None:
    """Return a tool's version; None if it is not installed."""
    if not shutil.which(command[0]):
        return None
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+\.\d+(\.\d+)?", told)

    return found[0] if found else None


def note_card(record: Record) -> None:
    """Record the GPU as torch and the driver see it."""
    gpu = gpu_of(torch.device("cuda", 0))
    facts = torch.cuda.get_device_properties(0)
    record.note(
        card=gpu.name,
        capability=".".join(map(str, gpu.capability)),
        shared_memory_kib=gpu.shared_memory / 1024,
        memory_gib=facts.total_memory / 2**30,
        memory_free_gib=torch.cuda.mem_get_info(0)[0] / 2**30,
        processors=facts.multi_processor_count,
        cuda=torch.version.cuda,
        peak_tflops=peak_of(gpu.name) or None,
        driver=driver_version(),
    )
    peak = f"{peak_of(gpu.name):.0f} TFLOP/s" if peak_of(gpu.name) else "peak not known: no MFU"
    record.say(f"{gpu}, {facts.total_memory / 2**30:.0f} GiB, {peak}")
    record.expect(torch.cuda.is_bf16_supported(), f"{gpu} has no bfloat16")


def driver_version() -> str | None:
    """Return the driver's version from nvidia-smi; None if that is not installed."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()

    return told[0].strip() if told else None


def step_one_linear(place: Place, record: Record) -> None:
    """Step a Linear with DeepSpeed, started as our engine starts it."""
    began = time.monotonic()
    import deepspeed

    from megatron_interbert.machines.processes import start_processes

    device = start_processes()
    model = torch.nn.Linear(16, 16, device=device)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
    }
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    loss = engine(torch.ones(1, 16, device=device, dtype=torch.bfloat16)).float().sum()
    engine.backward(loss)
    engine.step()
    place.wait()

    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    built = sorted(path.parent.name for path in folder.rglob("*.so"))
    seconds = time.monotonic() - began
    record.note(deepspeed_seconds=seconds, deepspeed_built=built)
    record.say(f"DeepSpeed stepped in {seconds:.1f} s, built {', '.join(built) or 'nothing'}")
    record.expect(device.type == place.device.type, f"our processes take {device}")
    record.expect(
        not built, f"DeepSpeed compiles {', '.join(built)} at every start on a new machine"
    )


def run_gpu_tests(place: Place, record: Record) -> None:
    """Run the tests with the marker gpu; without a GPU all must be skipped."""
    results = place.scratch / "pytest.xml"
    ended = Program(
        *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
        *(f"--junitxml={results}", "tests/gpu"),
    ).wait()
    record.expect(results.exists(), f"pytest ended with code {ended.code}: {ended.last}")
    if not results.exists():
        return

    suite = next(ElementTree.parse(results).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    record.note(**counts, passed=passed)
    wrong = counts["failures"] + counts["errors"]
    record.say(f"{passed} passed, {wrong} failed, {counts['skipped']} skipped")

    for case in suite.iter("testcase"):
        for problem in (*case.iter("failure"), *case.iter("error")):
            text = " ".join(problem.get("message", "").split())
            record.expect(False, f"{case.get('name')}: {text[:160]}")

    if place.pretended:
        record.expect(counts["skipped"] == counts["tests"] > 0, "tests for a GPU ran without one")
    else:
        record.expect(passed > 0, "no test ran")
