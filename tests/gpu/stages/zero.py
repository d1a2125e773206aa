"""Check that a run stopped at one ZeRO stage, or with offload, resumes unchanged at another."""

from pathlib import Path
from typing import Any

from tests.gpu.stages.data import small_store
from tests.gpu.stages.place import Place, Record
from tests.gpu.stages.programs import Ended, Program, module
from tests.launching import records

STEPS = 10
STOP = 5
NAMES = ("msm_loss", "mrm_loss", "itm_loss", "grad_norm")
NEAR = {"fp32": 2e-4, "bf16": 2e-2, "fp16": 2e-2}  # accepted relative difference of a figure
OFFLOAD = ("--deepspeed-config", "ds_configs/zero2_offload_optimizer.json")
OFFLOAD_ALL = ("--deepspeed-config", "ds_configs/zero3_offload.json")


def stage(number: int) -> tuple:
    """Return the flags of a ZeRO stage."""
    return ("--zero-stage", number)


# Precision -> (flags before the stop, flags after it). On one rank DeepSpeed shards nothing in bf16
# and fp32, where the update is ours; in fp16 and with offload it is DeepSpeed's.
WAYS = {
    "bf16": {
        "2 to 3": (stage(2), stage(3)),
        "3 to offload": (stage(3), OFFLOAD),
        "offload to 2": (OFFLOAD, stage(2)),
    },
    "fp16": {"2 to 3": (stage(2), stage(3)), "3 to offload of all": (stage(3), OFFLOAD_ALL)},
}


def check_stages(place: Place, record: Record) -> None:
    """Run each precision uninterrupted, and with a change of stage after five steps."""
    for precision, ways in WAYS.items():
        if precision == "fp16" and place.pretended and not half_is_there():
            precision = "fp32"
        check_precision(place, record, precision, ways)


def half_is_there() -> bool:
    """Check whether the device computes in fp16."""
    from megatron_interbert.training.engine import half_precision_supported

    return half_precision_supported()


def check_precision(place: Place, record: Record, precision: str, ways: dict[str, tuple]) -> None:
    """Run and compare all runs of one precision, several at a time."""
    folder = place.scratch / "zero" / precision
    whole = start(place, folder / "whole", precision, stage(1))
    first = {
        name: start(place, folder / name, precision, way[0], stop=True)
        for name, way in ways.items()
    }
    reference = whole.wait()
    ended = {name: program.wait() for name, program in first.items()}
    again = {
        name: start(place, folder / name, precision, way[1])
        for name, way in ways.items()
        if not ended[name].code
    }
    ended |= {name: program.wait() for name, program in again.items()}
    record.expect(
        reference.code == 0, f"{precision}, stage 1: code {reference.code}: {reference.last}"
    )
    for name, one in ended.items():
        record.expect(one.code == 0, f"{precision}, {name}: code {one.code}: {one.last}")
    if reference.code == 0:
        compare(record, folder, precision, ended)


def start(
    place: Place, save: Path, precision: str, flags: tuple[Any, ...], stop: bool = False
) -> Program:
    """Start a run of STEPS steps, to its end or to STOP."""
    return module(
        "pretrain",
        *(
            "--model",
            "tiny",
            "--data-path",
            small_store(place),
            "--micro-batch-size",
            16,
            "--lr",
            "1e-3",
        ),
        *("--train-iters", STEPS, "--log-interval", 1, "--num-workers", 0, "--save", save),
        *(["--exit-interval", STOP] if stop else []),
        *([] if precision == "fp32" else [f"--{precision}"]),
        *flags,
    )


def compare(record: Record, folder: Path, precision: str, ended: dict[str, Ended]) -> None:
    """Compare losses and norms of each run with those of the uninterrupted one."""
    expected = records(folder / "whole")
    worst = 0.0

    for name, one in ended.items():
        if one.code:
            continue

        found = records(folder / name)
        record.expect(
            sorted(found) == sorted(expected),
            f"{precision}, {name}: {len(found)} steps of {len(expected)} recorded",
        )
        off = max(difference(found[step], expected[step]) for step in found)
        worst = max(worst, off)
        record.note(**{f"{precision}, {name}": off})
        record.expect(
            off < NEAR[precision], f"{precision}, {name}: losses or norms are off by {off:.1e}"
        )

    record.say(f"{precision}: {', '.join(ended)}: worst relative difference {worst:.1e}")


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the largest relative difference of a step's figures; infinite if only one is NaN."""
    worst = 0.0

    for name in NAMES:
        a = ours[name]
        b = theirs[name]
        missing = a is None or b is None  # NaN: a step that fp16's loss scale skipped
        if missing and a != b:
            return float("inf")
        if not missing:
            worst = max(worst, abs(a - b) / max(abs(b), 1e-6))

    return worst
