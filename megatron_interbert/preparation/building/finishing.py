"""Finish a build once all units are converted: totals, report, manifest, and the final name."""

import bisect
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_interbert.data.hdf5 import Hdf5File
from megatron_interbert.data.manifest import (
    MANIFEST,
    PLAN,
    REPORT,
    TEXTS,
    VOCABULARY,
    files_of,
    read_manifest,
)
from megatron_interbert.errors import UsageError
from megatron_interbert.files import encoded, publish_folder, whole_file
from megatron_interbert.preparation.building.build_folder import CAPTIONS_DONE, OURS, read_work_file
from megatron_interbert.preparation.building.captions.reading import REJECTED
from megatron_interbert.preparation.building.captions.table import CaptionTable
from megatron_interbert.preparation.building.conversion import NO_CAPTION, done_file
from megatron_interbert.preparation.building.joining import (
    MERGED,
    Decision,
    Images,
    decide,
    source_labels,
)
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.rewriting import change_shards, keep_captions
from megatron_interbert.preparation.building.sources.base import SourceFacts
from megatron_interbert.preparation.building.store_writer import finish_store, new_manifest
from megatron_interbert.preparation.building.unit_pool import too_many_dropped
from megatron_interbert.preparation.work_folder import own_names, remove_folder


def finish(
    plan: BuildPlan,
    facts: SourceFacts,
    work: Path,
    units: Sequence[int],
    table: CaptionTable | None,
    max_dropped: float,
) -> None:
    """Finish everything except the last rename: decide about names and captions, add up totals, and
    write report, captions and manifest.

    `units` are the numbers of the sources of the units.
    """
    done = _Done(work, units)
    if not done.entries:
        _explain_nothing(plan, work, done.totals["read"], done.reasons, len(units))

    _check_dropped(done, max_dropped)
    labels = source_labels([str(getattr(source, "path", "")) for source in plan.sources])
    only = plan.only is not None
    decision = decide(done.images, labels, table, bool(plan.caption_files), only)
    if not plan.caption_files:
        keep_captions(work, done.entries, decision)

    left_out = [
        (row, change.reason) for row, change in sorted(decision.changes.items()) if change.reason
    ]
    done.drop(left_out)
    _check_dropped(done, max_dropped)

    manifest = new_manifest(
        feature_dim=facts.feature_dim,
        num_classes=facts.num_classes,
        detector=plan.detector,
        background_class=facts.background_class,
        soft_labels=" and ".join(sorted({p for kind in +done.kinds for p in kind.split(" and ")})),
        text_normalisation=plan.text_normalisation,
        class_names=facts.class_names,
        repaired_boxes=done.totals["repaired"],
        inverted_boxes=done.totals["inverted"],
        images_by_label_kind=dict(sorted((+done.kinds).items())),
        images_read=done.totals["read"],
        dropped=dict(sorted(done.reasons.items())),
        captions_left_out=_captions_left_out(work, decision),
        renamed_images=decision.renamed,
    )
    manifest["shards"] = change_shards(work, done.entries, decision.changes)
    if not manifest["shards"]:
        _explain_nothing(plan, work, done.totals["read"], done.reasons, len(units))

    _write_report(
        work / REPORT,
        itertools.chain(
            _caption_complaints(work),
            _of_decision(decision, plan),
            _dropped(work, len(units)),
            done.lines(left_out),
        ),
    )
    finish_store(work, manifest, plan.vocabulary)
    _print_seconds(done.seconds)


def _print_seconds(seconds: Counter[str]) -> None:
    """Print where the time of the processes went, if reading had parts: those of photos."""
    parts = {name: spent for name, spent in seconds.items() if name not in ("reading", "writing")}
    if not parts:
        return

    beside = sum(spent for name, spent in parts.items() if "beside" in name)
    rest = seconds["reading"] - sum(parts.values()) + beside
    total = seconds["reading"] + seconds["writing"]
    for name, spent in {**parts, "writing": seconds["writing"], "the rest": rest}.items():
        print(f"  {name:<32} {spent:10.1f} s  {100 * spent / max(total, 1e-9):5.1f} %")


class _Done:
    """Add up what the units of a build have left: shards, totals, and all images by name."""

    def __init__(self, work: Path, units: Sequence[int]) -> None:
        self.entries: list[dict[str, Any]] = []
        self.totals: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.labels: list[str] = []  # kind of the labels of each image kept
        self.images = Images()
        self.seconds: Counter[str] = Counter()  # of all processes, by what took them

        for number, source in enumerate(units):
            self._add(work, read_work_file(done_file(work, number)), source)

        self.kinds = Counter(self.labels)

    def _add(self, work: Path, done: dict[str, Any], source: int) -> None:
        self.totals.update(
            {name: done[name] for name in ("read", "repaired", "inverted", "faults")}
        )
        self.reasons.update(done["reasons"])
        self.seconds.update(done.get("seconds", {}))
        for line in done["dropped"]:
            if line["image_id"]:
                self.images.add(line["image_id"], source, False, line["reason"] == NO_CAPTION)

        if done["entry"]:
            self.entries.append(done["entry"])
            self.labels += [sys.intern(kind) for kind in done["labels"]]
            with Hdf5File(work / done["entry"]["file"]) as file:
                for name in file.strings("image_ids").tolist():
                    self.images.add(name, source, True)

    def drop(self, rows: Sequence[tuple[int, str]]) -> None:
        """Count images that are dropped after all, given as (row, reason)."""
        self.kinds.subtract(self.labels[row] for row, _ in rows)
        self.reasons.update(reason for _, reason in rows)
        self.totals["faults"] += sum(reason != MERGED for _, reason in rows)

    def lines(self, rows: Sequence[tuple[int, str]]) -> Iterator[dict[str, str]]:
        """Yield the lines of the report about them."""
        ends = list(itertools.accumulate(entry["images"] for entry in self.entries))
        names = [
            name for name, row in zip(self.images.names, self.images.rows, strict=True) if row >= 0
        ]
        for row, reason in rows:
            shard = bisect.bisect_right(ends, row)
            place = row - (ends[shard - 1] if shard else 0)
            where = f"{self.entries[shard]['file']}: image {place}"
            yield {"where": where, "image_id": names[row], "reason": reason, "details": ""}


def _check_dropped(done: _Done, max_dropped: float) -> None:
    if done.totals["faults"] > max_dropped * done.totals["read"]:
        faults = done.totals["faults"]
        raise UsageError(too_many_dropped(faults, done.totals["read"], done.reasons, max_dropped))


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


def _captions_left_out(work: Path, decision: Decision) -> dict[str, int]:
    """Count captions that no image gets, by reason, and records without a usable one."""
    complaints = Counter(line["reason"] for line in read_complaints(work))
    return dict(sorted({**complaints, **decision.left_out}.items()))


def _caption_complaints(work: Path) -> Iterator[dict[str, str]]:
    for line in read_complaints(work):
        yield {
            "where": line["where"],
            "image_id": "",
            "reason": "caption record",
            "details": line["reason"],
        }


def _of_decision(decision: Decision, plan: BuildPlan) -> Iterator[dict[str, str]]:
    """Yield a line for each reason why captions or ids of --only are left out, with the first."""
    files = ", ".join(plan.caption_files)
    for reason, count in decision.left_out.items():
        yield {
            "where": files,
            "image_id": decision.examples[reason],
            "reason": "captions left out",
            "details": f"{count} captions, {reason}; the first is of this image",
        }

    if decision.not_found:
        yield {
            "where": "--only",
            "image_id": "",
            "reason": "ids of no image",
            "details": f"{decision.not_found} ids",
        }


def _dropped(work: Path, units: int) -> Iterator[dict[str, str]]:
    for number in range(units):
        yield from read_work_file(done_file(work, number))["dropped"]


def _write_report(path: Path, lines: Iterator[dict[str, str]]) -> None:
    """Write the report line by line: a part of a large store may drop millions of images."""
    with whole_file(path) as handle:
        for line in lines:
            handle.write(encoded(json.dumps(line, ensure_ascii=False) + "\n"))


def _explain_nothing(
    plan: BuildPlan, work: Path, read: int, reasons: Counter[str], units: int
) -> None:
    reason = (
        NO_CAPTION
        if reasons[NO_CAPTION]
        else next((reason for reason, _ in reasons.most_common(1)), "the sources are empty")
    )
    first = next(
        (line for line in _dropped(work, units) if line["reason"] == reason),
        {"where": "", "details": ""},
    )
    remove_folder(work, OURS)  # units without a single image are useless

    if reason == NO_CAPTION:
        raise UsageError(
            f"none of the {read} images has a caption in {', '.join(plan.caption_files)}: their"
            f" image ids differ (one in the features is {first['image_id']!r})"
        )

    raise UsageError(
        f"none of the {read} images can be used, mostly: {reason} ({first['where']}:"
        f" {first['details']})"
    )


def publish(work: Path, output: Path, has_vocabulary: bool) -> dict[str, Any]:
    """Remove what only the build needed, rename the folder to `output`, and return the manifest."""
    manifest = read_manifest(work)
    keep = {
        MANIFEST,
        REPORT,
        PLAN,
        *([VOCABULARY] if has_vocabulary else []),
        *(entry["file"] for entry in files_of(manifest)),
    }
    for name in own_names(work, OURS):
        if name not in keep:
            (work / name).unlink()

    publish_folder(work, output)

    return manifest
