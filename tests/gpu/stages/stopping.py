"""Check one rank too many, and a stopped and resumed run against an uninterrupted one."""

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.gpu.stages.data import small_store
from tests.gpu.stages.place import Place, Record
from tests.gpu.stages.programs import Ended, Program, module, until
from tests.launching import losses, steps

# Makes torch report one GPU, for runs without any.
ONE_GPU = """
import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
"""


def check_stopping(place: Place, record: Record) -> None:
    """Check two processes on one GPU, and that 200 steps with a SIGTERM after 100 equal an
    uninterrupted run to the bit.

    The three runs start together. The model is tiny: the sample model's layers, but with dropout.
    """
    number = place.choose(200, 12)
    flags = (
        *("--model", "tiny", "--data-path", small_store(place), "--micro-batch-size", 16),
        *("--bf16", "--deterministic", "--log-interval", 1, "--train-iters", number),
    )
    whole = place.scratch / "whole"
    stopped = place.scratch / "stopped"
    runs = [module("pretrain", *flags, "--save", folder) for folder in (whole, stopped)]
    crowd = start_two(place, flags)
    until(lambda: steps(stopped) >= number // 2, runs[1])
    runs[1].signal(signal.SIGTERM)
    undisturbed, first = (run.wait() for run in runs)
    check_crowd(crowd.wait(), record)

    at = steps(stopped)
    second = module("pretrain", *flags, "--save", stopped).wait()
    codes = {"undisturbed": undisturbed.code, "stopped": first.code, "resumed": second.code}
    record.note(codes=codes, stopped_after=at)
    expected = {"undisturbed": 0, "stopped": 75, "resumed": 0}
    record.expect(codes == expected, f"exit codes {codes}, expected {expected}: {second.last}")
    record.expect(at < number, f"the signal came too late: {at} steps of {number} were done")
    if codes == expected:
        compare(whole, stopped, number, at, record)


def compare(whole: Path, stopped: Path, number: int, at: int, record: Record) -> None:
    """Compare the losses and norms of every step, and the last checkpoints."""
    ours = losses(stopped)
    theirs = losses(whole)
    record.expect(len(theirs) == number, f"{len(theirs)} steps recorded, expected {number}")
    odd = [step for step in sorted(theirs) if ours.get(step) != theirs[step]]
    record.expect(not odd, f"stopped after {at}: losses differ from step {odd[0] if odd else 0} on")
    last = [state_of(folder) for folder in (whole, stopped)]
    wrong = [name for name, value in last[0].items() if not value.equal(last[1][name])]
    record.expect(bool(last[0]), "the last checkpoint holds no tensors")
    record.expect(not wrong, f"the last checkpoints differ in {', '.join(wrong[:3])}")
    record.note(same_steps=number - len(odd), tensors=len(last[0]), different=len(wrong))
    if not odd and not wrong:
        record.say(f"stopped after {at} of {number} steps (code 75), resumed: same bits to the end")


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Load all tensors of the newest checkpoint, weights and moments, by file and name."""
    newest = folder / (folder / "latest").read_text().strip()
    found = {}
    for path in sorted(newest.rglob("*.safetensors")):
        found |= {f"{path.stem}: {name}": value for name, value in load_file(path).items()}
    return found


def start_two(place: Place, flags: tuple) -> Program:
    """Start two ranks on a machine with one GPU, or torch patched to report one."""
    changes: dict[str, str | None] = {"PROCESSES_PER_NODE": "2"}

    if place.pretended:
        (place.scratch / "one_gpu").mkdir()
        (place.scratch / "one_gpu" / "sitecustomize.py").write_text(ONE_GPU)
        found = os.pathsep.join([str(place.scratch / "one_gpu"), os.environ["PYTHONPATH"]])
        changes |= {"DS_ACCELERATOR": None, "PYTHONPATH": found}

    return Program(sys.executable, "launchers/node.py", "launchers/pretrain.sh", *flags, **changes)


def check_crowd(ended: Ended, record: Record) -> None:
    """Check for one clear error line and exit code 2."""
    record.note(two_ranks_code=ended.code, two_ranks_said=ended.errors)
    record.expect(
        ended.code == 2 and len(ended.errors) == 1 and "torch sees 1 GPU" in ended.errors[0],
        f"two ranks on one GPU: code {ended.code}, {len(ended.errors)} lines of error, expected 2"
        f" and 1: {ended.last}",
    )
    if ended.errors:
        record.say(f"two ranks, one GPU: {ended.errors[0][:110]}")
