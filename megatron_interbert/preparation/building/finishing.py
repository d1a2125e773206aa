"""Finish a build once all units are converted: totals, report, manifest, and the final name."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_interbert.data.manifest import (
    MANIFEST,
    PLAN,
    REPORT,
    VOCABULARY,
    files_of,
    read_manifest,
)
from megatron_interbert.errors import UsageError
from megatron_interbert.files import publish_folder
from megatron_interbert.preparation.building.build_folder import OURS
from megatron_interbert.preparation.building.captions.table import CaptionTable
from megatron_interbert.preparation.building.conversion import LINE
from megatron_interbert.preparation.building.joining import (
    ADVICE,
    NO_CAPTION,
    NOT_WANTED,
    decide,
    source_labels,
)
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.report import (
    captions_left_out,
    complaint_lines,
    decision_lines,
    dropped_lines,
    print_seconds,
    write_report,
)
from megatron_interbert.preparation.building.rewriting import change_shards, settle_repeated
from megatron_interbert.preparation.building.sources.base import SourceFacts
from megatron_interbert.preparation.building.store_writer import finish_store, new_manifest
from megatron_interbert.preparation.building.tally import Tally
from megatron_interbert.preparation.work_folder import own_names, remove_folder


def finish(
    plan: BuildPlan,
    facts: SourceFacts,
    work: Path,
    units: Sequence[int],
    table: CaptionTable | None,
    max_dropped: float,
    alone: bool = True,
) -> None:
    """Finish everything except the last rename: decide about names and captions, add up totals, and
    write report, captions and manifest.

    `units` are the numbers of the sources of the units. A process that is `alone` removes a folder
    in which there is nothing of use.
    """
    done = Tally(work, units)
    dropped = functools.partial(dropped_lines, work, len(units))
    if not done.entries:
        _explain_nothing(plan, work, done, dropped(), table, alone)

    done.check(max_dropped)
    labels = source_labels([str(getattr(source, "path", "")) for source in plan.sources])
    only = plan.only is not None
    decision = decide(done.images, labels, table, bool(plan.caption_files), only)
    if decision.repeated:
        settle_repeated(work, done.entries, decision, captions=not plan.caption_files)

    left_out = [
        (row, change.reason) for row, change in sorted(decision.changes.items()) if change.reason
    ]
    done.drop(left_out)
    done.check(max_dropped)

    manifest = new_manifest(
        feature_dim=facts.feature_dim,
        num_classes=facts.num_classes,
        num_attributes=facts.num_attributes,
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
        captions_left_out=captions_left_out(work, decision),
        renamed_images=decision.renamed,
        only_not_found=len(decision.not_found),
    )
    manifest["shards"] = change_shards(work, done.entries, decision.changes)
    if not manifest["shards"]:
        _explain_nothing(plan, work, done, done.lines(left_out), table, alone)

    lines = (
        complaint_lines(work),
        decision_lines(decision, plan),
        dropped(),
        done.lines(left_out),
    )
    write_report(work / REPORT, itertools.chain.from_iterable(lines))
    finish_store(work, manifest, plan.vocabulary)
    print_seconds(done.seconds)


def _explain_nothing(
    plan: BuildPlan,
    work: Path,
    done: Tally,
    lines: Iterator[dict[str, str]],
    table: CaptionTable | None,
    remove: bool,
) -> None:
    """Raise UsageError that says why no image is left, with the first of the `lines` about dropped
    images that shows it; if asked, `remove` the units, which are useless.
    """
    reason = next((reason for reason, _ in done.reasons.most_common(1)), "the sources are empty")
    first = next((line for line in lines if line["reason"] == reason), dict.fromkeys(LINE, ""))
    name = table.name_of(0) if reason == NO_CAPTION and table else ""
    if remove:
        remove_folder(work, OURS)
    read = done.totals["read"]

    if reason == NO_CAPTION:
        raise UsageError(
            f"none of the {read} images has a caption in {', '.join(plan.caption_files)}: their"
            f" image ids differ (one in the features is {first['image_id'][:80]!r}, one in the"
            f" captions {name[:80]!r})"
        )

    if reason == NOT_WANTED and table:
        wanted = next(iter(table.wanted_names().values()), "")
        raise UsageError(
            f"none of the {read} images is in --only (one id there is {wanted[:80]!r}, one in the"
            f" sources {first['image_id'][:80]!r}); give ids of the sources, one a line"
        )

    details = f": {first['details']}" if first["details"] else ""
    advice = f". {ADVICE[reason]}" if reason in ADVICE else ""
    raise UsageError(
        f"none of the {read} images can be used, mostly: {reason} ({first['where']}{details})"
        f"{advice}"
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
            (work / name).unlink(missing_ok=True)

    publish_folder(work, output)

    return manifest
