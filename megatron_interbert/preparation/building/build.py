"""Build a region store from any sources with several processes, so that a kill at any moment costs
at most the shard that each process is working on.

    OUTPUT.partial/plan.json        what is being built; another plan is refused; kept in the store
                   images.db        captions and wanted images by name (SQLite)
                   shard-N.h5       one for each unit of work
                   shard-N.h5.json  counts of a unit, written last: marks it as done
    OUTPUT/                         the same folder, renamed when complete

A unit's result depends on the unit alone, so the store is the same whatever the number of processes
and of kills.
"""

import json
import os
from pathlib import Path
from typing import Any

from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_text
from megatron_interbert.preparation.building.build_folder import (
    CAPTIONS_DONE,
    BuildFolder,
    disk_errors_in_one_line,
)
from megatron_interbert.preparation.building.captions.reading import CaptionFile, Complaint
from megatron_interbert.preparation.building.captions.table import CaptionTable
from megatron_interbert.preparation.building.conversion import UnitJob, is_done
from megatron_interbert.preparation.building.finishing import (
    check_complaints,
    finish,
    publish,
)
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.base import SourceFacts
from megatron_interbert.preparation.building.unit_pool import convert_units


def build(
    plan: BuildPlan, workers: int = 1, max_dropped: float = 0.1, restart: bool = False
) -> dict[str, Any]:
    """Build a store and return its manifest; after a kill, the same plan resumes.

    `max_dropped` is the largest share of images that may be dropped for faults. Raises UsageError
    for bad input, TrainingStopped if a worker process dies.
    """
    output = Path(plan.output)
    if os.path.lexists(output):
        raise UsageError(f"--output {output}: already exists; choose another folder or remove it")
    for path in plan.caption_files:
        if not os.path.exists(path):
            raise UsageError(f"--captions {path}: no such file or folder")

    facts = _common_facts(plan)
    units = [
        (number, unit)
        for number, source in enumerate(plan.sources)
        for unit in source.units(plan.images_per_shard)
    ]
    work = output.with_name(output.name + ".partial")

    with BuildFolder(work, plan.fingerprint(units), restart), disk_errors_in_one_line(work):
        if not (work / MANIFEST).exists():
            table = _caption_table(plan, work)
            check_complaints(work, len(table) if table else 0, max_dropped)
            shared = (
                work,
                facts,
                table,
                bool(plan.caption_files),
                plan.only is not None,
                plan.soft_labels,
                plan.strict_boxes,
            )
            jobs = [
                UnitJob(source, unit, number, *shared)
                for number, (source, unit) in enumerate(units)
            ]
            left = [job for job in jobs if not is_done(work, job.number)]
            convert_units(left, len(jobs), plan.sources, workers, max_dropped)
            finish(plan, facts, work, [source for source, _ in units], table, max_dropped)

        return publish(work, output, bool(plan.vocabulary))


def _common_facts(plan: BuildPlan) -> SourceFacts:
    """Return the facts that all sources share; raise UsageError if they differ."""
    all_facts = [source.facts() for source in plan.sources]
    first = all_facts[0]
    names = list(plan.class_names) or next(
        (list(facts.class_names) for facts in all_facts if facts.class_names), []
    )

    for source, facts in zip(plan.sources, all_facts, strict=True):
        where = getattr(source, "path", "source")
        if facts.background_class != first.background_class:
            raise UsageError(
                f"{where}: background is class {facts.background_class}, but class"
                f" {first.background_class} in the first source"
            )

        if facts.class_names and not plan.class_names and list(facts.class_names) != names:
            raise UsageError(
                f"{where}: its class names differ from those of the sources before it; give the"
                " right ones with --class-names"
            )

        if (facts.feature_dim, facts.num_classes) != (first.feature_dim, first.num_classes):
            raise UsageError(
                f"{where}: features of size {facts.feature_dim} and {facts.num_classes} classes,"
                f" but the first source has {first.feature_dim} and {first.num_classes}; a store"
                " holds the features of one detector"
            )

    if names and len(names) != first.num_classes:
        raise UsageError(
            f"--class-names: {len(names) - 1} names, expected {first.num_classes - 1} (without"
            " background)"
        )

    return SourceFacts(
        first.feature_dim,
        first.num_classes,
        first.soft_labels,
        names,
        plan.detector,
        first.background_class,
    )


def _caption_table(plan: BuildPlan, work: Path) -> CaptionTable | None:
    """Write captions and wanted ids to disk once, and open them; None if there are neither."""
    path = work / "images.db"
    done = work / CAPTIONS_DONE
    if not plan.caption_files and plan.only is None:
        return None
    if not done.exists():
        files = [CaptionFile(file, plan.captions_format) for file in plan.caption_files]
        for file in files:
            print(f"captions: {file.describe()}", flush=True)

        complaints: list[Complaint] = []
        table = CaptionTable.create(path, files, plan.split, complaints.append, plan.only or ())
        if plan.caption_files and not len(table):
            first = f"{complaints[0].where}: {complaints[0].reason}" if complaints else "empty"
            raise UsageError(
                f"--captions {', '.join(plan.caption_files)}: no captions found ({first})"
            )

        write_text(done, json.dumps([vars(complaint) for complaint in complaints]))

    return CaptionTable(path)
