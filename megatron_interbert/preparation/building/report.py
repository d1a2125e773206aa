"""Report what a build leaves out: images, captions and records, each with the reason, in
dropped.jsonl of the store; and where the time went.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_interbert.data.manifest import TEXTS
from megatron_interbert.errors import UsageError
from megatron_interbert.files import encoded, own_name, whole_file
from megatron_interbert.preparation.building.build_folder import CAPTIONS_DONE, read_work_file
from megatron_interbert.preparation.building.captions.reading import REJECTED
from megatron_interbert.preparation.building.conversion import done_file
from megatron_interbert.preparation.building.joining import Decision
from megatron_interbert.preparation.building.plan import BuildPlan


def read_complaints(work: Path) -> list[dict[str, str]]:
    """Read what is wrong with records of caption files; raise UsageError if that is damaged."""
    path = work / CAPTIONS_DONE
    if not path.exists():
        return []

    lines = read_work_file(path)
    fits = isinstance(lines, list) and all(
        isinstance(line, dict)
        and line.keys() == {"reason", "where"}
        and TEXTS.fits([*line.values()])
        for line in lines
    )
    if not fits:
        raise UsageError(
            f"{path}: damaged (expected reasons and places); start the build over with --restart"
        )

    return lines


def check_complaints(work: Path, captions: int, max_dropped: float) -> None:
    """Raise UsageError if more than a share `max_dropped` of the caption records are of no use."""
    bad = [line for line in read_complaints(work) if line["reason"] != REJECTED]
    if len(bad) > max_dropped * (captions + len(bad)):
        raise UsageError(
            f"{len(bad)} caption records cannot be used, beside {captions} captions; the first is"
            f" {bad[0]['where']}: {bad[0]['reason']}; more than --max-dropped {max_dropped}. Fix"
            " the file, or allow more with a higher --max-dropped"
        )


def captions_left_out(work: Path, decision: Decision) -> dict[str, int]:
    """Count captions that no image gets, by reason, and records without a usable one."""
    complaints = Counter(line["reason"] for line in read_complaints(work))
    return dict(sorted({**complaints, **decision.left_out}.items()))


def complaint_lines(work: Path) -> Iterator[dict[str, str]]:
    """Yield a line for each record of the caption files that is of no use."""
    for line in read_complaints(work):
        yield {
            "where": line["where"],
            "image_id": "",
            "reason": "caption record",
            "details": line["reason"],
        }


def decision_lines(decision: Decision, plan: BuildPlan) -> Iterator[dict[str, str]]:
    """Yield a line for each reason why captions or ids of --only are left out, with the first."""
    files = ", ".join(plan.caption_files)
    for reason, count in decision.left_out.items():
        yield {
            "where": files,
            "image_id": decision.examples[reason],
            "reason": "captions left out",
            "details": f"{count} captions, {reason}; the first is of this image",
        }

    for name in decision.not_found:
        yield {"where": "--only", "image_id": name, "reason": "ids of no image", "details": ""}


def dropped_lines(work: Path, units: int) -> Iterator[dict[str, str]]:
    """Yield the lines about images that the units have dropped."""
    for number in range(units):
        yield from read_work_file(done_file(work, number))["dropped"]


def write_report(path: Path, lines: Iterator[dict[str, str]]) -> None:
    """Write the report line by line: a part of a large store may drop millions of images."""
    with whole_file(path, own_name(path)) as handle:
        for line in lines:
            handle.write(encoded(json.dumps(line, ensure_ascii=False) + "\n"))


def print_seconds(seconds: Counter[str]) -> None:
    """Print where the time of the processes went, if reading had parts: those of photos."""
    parts = {name: spent for name, spent in seconds.items() if name not in ("reading", "writing")}
    if not parts:
        return

    beside = sum(spent for name, spent in parts.items() if "beside" in name)
    rest = seconds["reading"] - sum(parts.values()) + beside
    total = seconds["reading"] + seconds["writing"]
    for name, spent in {**parts, "writing": seconds["writing"], "the rest": rest}.items():
        share = f"  {100 * spent / max(total, 1e-9):5.1f} %"
        print(f"  {name:<32} {spent:10.1f} s{share if 'beside' not in name else ''}")
