"""Finish a build once all units are converted: totals, report, manifest, and the final name."""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from megatron_interbert.preparation.building.captions import image_key
from megatron_interbert.preparation.building.conversion import NO_CAPTION, TWICE, done_file
from megatron_interbert.preparation.building.duplicates import drop_duplicates
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.base import SourceFacts
from megatron_interbert.preparation.building.store_writer import finish_store, new_manifest
from megatron_interbert.preparation.building.unit_pool import too_many_dropped
from megatron_interbert.preparation.work_folder import own_names, remove_folder


def finish(plan: BuildPlan, facts: SourceFacts, work: Path, units: int, max_dropped: float) -> None:
    """Finish everything except the last rename: drop repeated images, add up totals, and write
    report, captions and manifest.
    """
    entries = []
    totals = Counter()
    reasons = Counter()
    labels: dict[str, list[str]] = {}  # of each image, by shard

    for number in range(units):
        done = read_work_file(done_file(work, number))
        if done["entry"]:
            entries.append(done["entry"])
            labels[done["entry"]["file"]] = [sys.intern(kind) for kind in done["labels"]]

        totals.update({name: done[name] for name in ("read", "repaired", "inverted", "faults")})
        reasons.update(done["reasons"])

    if not entries:
        _explain_nothing(plan, work, totals["read"], reasons, units)
    if totals["faults"] > max_dropped * totals["read"]:
        raise UsageError(too_many_dropped(totals["faults"], totals["read"], reasons, max_dropped))

    entries, twice = drop_duplicates(work, entries, image_key if plan.caption_files else str)
    kinds = Counter(kind for of_images in labels.values() for kind in of_images)
    kinds.subtract(labels[file][row] for file, row, _ in twice)
    reasons.update({TWICE: len(twice)} if twice else {})
    manifest = new_manifest(
        feature_dim=facts.feature_dim,
        num_classes=facts.num_classes,
        detector=plan.detector,
        background_class=facts.background_class,
        soft_labels=" and ".join(sorted({part for kind in +kinds for part in kind.split(" and ")})),
        text_normalisation=plan.text_normalisation,
        class_names=facts.class_names,
        repaired_boxes=totals["repaired"],
        inverted_boxes=totals["inverted"],
        images_by_label_kind=dict(sorted((+kinds).items())),
        images_read=totals["read"],
        dropped=dict(sorted(reasons.items())),
    )
    manifest["shards"] = entries
    _write_report(
        work / REPORT,
        itertools.chain(_caption_complaints(work), _dropped(work, units), _twice(twice)),
    )
    finish_store(work, manifest, plan.vocabulary)


def _caption_complaints(work: Path) -> Iterator[dict[str, str]]:
    path = work / CAPTIONS_DONE
    if path.exists():
        lines = read_work_file(path)
        if not TEXTS.fits(lines):
            raise UsageError(
                f"{path}: damaged (expected {TEXTS.words}); start the build over with --restart"
            )

        for line in lines:
            yield {"where": line, "image_id": "", "reason": "caption line", "details": ""}


def _dropped(work: Path, units: int) -> Iterator[dict[str, str]]:
    for number in range(units):
        yield from read_work_file(done_file(work, number))["dropped"]


def _twice(images: list[tuple[str, int, str]]) -> Iterator[dict[str, str]]:
    for file, row, name in images:
        yield {"where": f"{file}: image {row}", "image_id": name, "reason": TWICE, "details": ""}


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
