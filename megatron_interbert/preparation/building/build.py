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

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_interbert.data.manifest import MANIFEST, PLAN, read_manifest
from megatron_interbert.errors import UsageError
from megatron_interbert.files import encoded, flush_file, own_name, whole_file, write_text
from megatron_interbert.preparation.building.build_folder import (
    CAPTIONS_DONE,
    FAILED,
    BuildFolder,
    disk_errors_in_one_line,
)
from megatron_interbert.preparation.building.captions.reading import CaptionFile, Complaint
from megatron_interbert.preparation.building.captions.table import CaptionTable
from megatron_interbert.preparation.building.conversion import UnitJob, is_done
from megatron_interbert.preparation.building.finishing import finish, publish
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.report import check_complaints
from megatron_interbert.preparation.building.sources.base import SourceFacts
from megatron_interbert.preparation.building.unit_pool import convert_units
from megatron_interbert.preparation.sharing import ALONE, PAUSE, Claims, Team, WorkIsOver, in_turn
from megatron_interbert.preparation.sharing import OURS as OF_SHARING
from megatron_interbert.preparation.work_folder import remove_folder
from megatron_interbert.progress import progress
from megatron_interbert.reading import read_json

MOST_MISSES = 20  # of files that another process may be removing


def build(
    plan: BuildPlan,
    workers: int = 1,
    max_dropped: float = 0.1,
    restart: bool = False,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Build a store and return its manifest; after a kill, the same plan resumes.

    `max_dropped` is the largest share of images that may be dropped for faults. The processes of a
    `team` share the work. Raises UsageError for bad input, TrainingStopped if a worker process
    dies.
    """
    output = Path(plan.output)
    if os.path.lexists(output) and not (team.is_shared and _is_of(plan, output)):
        raise UsageError(f"--output {output}: already exists; choose another folder or remove it")
    for path in plan.caption_files:
        if not os.path.exists(path):
            raise UsageError(f"--captions {path}: no such file or folder")

    task = _Build(plan, workers, max_dropped, alone=not team.is_shared)
    with disk_errors_in_one_line(task.work):
        if team.is_shared:
            return _build_together(task, team)

        with BuildFolder(task.work, task.fingerprint, restart):
            if not (task.work / MANIFEST).exists():
                task.read_captions()
                task.convert(task.left())

            return task.finish()


def _is_of(plan: BuildPlan, output: Path) -> bool:
    """Check whether a store is what another process of the team has just built by this plan."""
    path = output / PLAN
    return path.exists() and read_json(path, "plan of the build") == plan.fingerprint(plan.units())


class _Build:
    """Hold the steps of a build, each of which does only what has not been done before."""

    def __init__(
        self, plan: BuildPlan, workers: int, max_dropped: float, alone: bool = True
    ) -> None:
        self.plan = plan
        self.alone = alone
        self.workers = workers
        self.max_dropped = max_dropped
        self.facts = _common_facts(plan)
        self.units = plan.units()
        self.fingerprint = plan.fingerprint(self.units)
        self.output = Path(plan.output)
        self.work = self.output.with_name(self.output.name + ".partial")
        self.table: CaptionTable | None = None
        self._done: set[int] = set()

    def is_ending(self) -> bool:
        """Check whether all but the final name is done, or that too."""
        return (self.work / MANIFEST).exists() or self.output.exists()

    def is_prepared(self) -> bool:
        """Check whether the plan and the captions are on disk."""
        needed = [PLAN, *([CAPTIONS_DONE] if self.plan.needs_names else [])]
        return all((self.work / name).exists() for name in needed)

    def read_captions(self) -> None:
        """Write captions and wanted ids to disk, or open what has been written."""
        if self.table is None and self.plan.needs_names:
            self.table = _caption_table(self.plan, self.work)
            check_complaints(self.work, len(self.table), self.max_dropped)

    def left(self) -> list[UnitJob]:
        """Return the units that are still to be converted."""
        plan = self.plan
        shared = {
            "folder": self.work,
            "facts": self.facts,
            "table": self.table,
            "use_captions": bool(plan.caption_files),
            "only": plan.only is not None,
            "soft_labels": plan.soft_labels,
            "strict_boxes": plan.strict_boxes,
        }
        self._done |= {
            number
            for number in range(len(self.units))
            if number not in self._done and is_done(self.work, number)
        }

        return [
            UnitJob(source, unit, number, **shared)
            for number, (source, unit) in enumerate(self.units)
            if number not in self._done
        ]

    def convert(self, jobs: Iterable[UnitJob], shown: bool = True) -> None:
        """Convert some of the units, with a progress bar if `shown`."""
        total = len(self.units)
        left = total - len(self._done)
        with progress(
            total=total, initial=len(self._done), unit="shard", desc="building", shown=shown
        ) as bar:
            convert_units(jobs, min(self.workers, left), self.plan, self.max_dropped, bar)

    @contextlib.contextmanager
    def failure_for_all(self) -> Iterator[None]:
        """Leave the reason of a failure to the other processes, which would meet it too."""
        try:
            yield
        except UsageError as error:
            path = self.work / FAILED
            with contextlib.suppress(OSError), whole_file(path, own_name(path)) as handle:
                handle.write(encoded(json.dumps(str(error))))
            raise

    def raise_failure_since(self, began: float) -> None:
        """Raise the UsageError with which another process has ended since this one began, both by
        the clock of the disk.
        """
        path = self.work / FAILED
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime >= began:
                raise UsageError(str(json.loads(path.read_bytes())))

    def finish(self, may_publish: Callable[[], bool] = lambda: True) -> dict[str, Any] | None:
        """Write the rest of the store and give it its final name if this process still may; return
        its manifest.
        """
        if not (self.work / MANIFEST).exists():
            sources = [source for source, _ in self.units]
            finish(
                self.plan, self.facts, self.work, sources, self.table, self.max_dropped, self.alone
            )

        if not may_publish():
            return None
        return publish(self.work, self.output, bool(self.plan.vocabulary))


def _build_together(task: _Build, team: Team) -> dict[str, Any]:
    """Build a store with the other processes of a team: each claims what none has claimed, until
    one of them publishes the store.
    """
    misses = 0

    while not task.output.exists():
        try:
            _take_part(task, team)
        except WorkIsOver:
            pass
        except (OSError, UsageError):
            misses += 1
            if not task.is_ending() or misses > MOST_MISSES:
                raise
            time.sleep(PAUSE)  # another process is removing what this one wanted to read

    remove_folder(task.work, OF_SHARING)  # if this process has come too late and made it again

    return read_manifest(task.output)


def _take_part(task: _Build, team: Team) -> None:
    with (
        BuildFolder(task.work, task.fingerprint, restart=False, shared=True) as folder,
        Claims(task.work, team) as claims,
    ):
        while not task.output.exists():
            task.raise_failure_since(claims.began)
            if task.is_ending():
                if claims.take("finish"):
                    task.finish()
            elif not task.is_prepared():
                if claims.take("captions"):
                    folder.prepare()
                    with task.failure_for_all():
                        task.read_captions()
                    claims.release("captions")
            else:
                folder.prepare()
                task.read_captions()
                task.convert(_taken(task, claims, in_turn(task.left(), team)), team.is_first)
                if not task.left() and claims.take("finish"):
                    with task.failure_for_all():
                        task.finish(lambda: claims.take("finish"))

            if not task.output.exists():
                time.sleep(PAUSE)


def _taken(task: _Build, claims: Claims, jobs: Iterable[UnitJob]) -> Iterator[UnitJob]:
    """Yield the units that this process claims."""
    for job in jobs:
        taken = claims.take(f"shard-{job.number:05d}")
        if taken and not task.is_ending() and not is_done(job.folder, job.number):
            yield job


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

    attributes = sorted({facts.num_attributes for facts in all_facts} - {0})
    if len(attributes) > 1:
        raise UsageError(
            f"the sources have {' and '.join(map(str, attributes))} attributes of regions; a store"
            " holds those of one detector"
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
        attributes[0] if attributes else 0,
    )


def _caption_table(plan: BuildPlan, work: Path) -> CaptionTable:
    """Write captions and wanted ids to disk once, and open them."""
    path = work / "images.db"
    done = work / CAPTIONS_DONE
    if done.exists():
        return CaptionTable(path)

    files = [CaptionFile(file, plan.captions_format) for file in plan.caption_files]
    for file in files:
        print(f"captions: {file.describe()}", flush=True)

    complaints: list[Complaint] = []
    beside = own_name(path)
    try:
        table = CaptionTable.create(beside, files, plan.split, complaints.append, plan.only or ())
        if plan.caption_files and not len(table):
            first = f"{complaints[0].where}: {complaints[0].reason}" if complaints else "empty"
            raise UsageError(
                f"--captions {', '.join(plan.caption_files)}: no captions found ({first})"
            )
        flush_file(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise

    write_text(done, json.dumps([vars(complaint) for complaint in complaints]))

    return CaptionTable(path)
