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
import hashlib
import itertools
import json
import multiprocessing
import os
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
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
from megatron_interbert.errors import TrainingStopped, UsageError
from megatron_interbert.files import encoded, json_sha256, publish_folder, whole_file, write_text
from megatron_interbert.preparation.building.captions import CaptionTable, image_key
from megatron_interbert.preparation.building.conversion import (
    EXPECTED,
    NO_CAPTION,
    TWICE,
    UnitJob,
    convert_unit,
    done_file,
    is_done,
)
from megatron_interbert.preparation.building.duplicates import drop_duplicates
from megatron_interbert.preparation.building.interrupts import (
    LOOK,
    interrupts_blocked,
    keeping_interrupts,
)
from megatron_interbert.preparation.building.sources.base import FeatureSource, SourceFacts
from megatron_interbert.preparation.building.store_writer import OURS as OF_STORES
from megatron_interbert.preparation.building.store_writer import finish_store, new_manifest
from megatron_interbert.preparation.work_folder import (
    lock_folder,
    own_names,
    refuse_strangers,
    remove_folder,
    remove_own,
)
from megatron_interbert.progress import progress
from megatron_interbert.reading import read_json, read_text

# in the work folder: complaints about caption lines; written when images.db is complete
CAPTIONS_DONE = "captions.json"
OF_BUILDS = ("shard-[0-9]*.h5.json", CAPTIONS_DONE, "images.db*", REPORT)
# All that a work folder holds, in the order of removal: the plan, which marks it as a build, last.
UNFINISHED = tuple(
    f"{name}{end}" for name in (*OF_BUILDS, PLAN) for end in (".[0-9]*.new", ".partial")
)
OURS = (*OF_BUILDS, *UNFINISHED, *OF_STORES, PLAN)
LMDB_LOCK = "lock.mdb"  # changes whenever an LMDB is read


@dataclass
class BuildPlan:
    """Hold the settings of a build.

    `options` are any further settings that change the result: with another value of one, it is
    another build.
    """

    sources: list[FeatureSource]
    output: str
    caption_files: list[str] = field(default_factory=list)
    captions_format: str = "auto"
    split: str = ""
    only: list[str] | None = None  # image ids to keep
    detector: dict[str, Any] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    soft_labels: int = 10
    vocabulary: str = ""
    text_normalisation: str = "none"  # that of the model for which captions are tokenised
    images_per_shard: int = 1024
    strict_boxes: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self, units: Sequence[Any]) -> dict[str, Any]:
        """Return what must be equal in another run for it to resume this one, ready for JSON."""
        files = {path: os.path.getsize(path) for path in self.caption_files}
        return {
            "captions": {"files": files, "format": self.captions_format, "split": self.split},
            "only": json_sha256(self.only) if self.only is not None else None,
            "detector": self.detector,
            "class_names": json_sha256(list(self.class_names)),
            "soft_labels": self.soft_labels,
            "vocabulary": json_sha256(self.vocabulary),
            "text_normalisation": self.text_normalisation,
            "images_per_shard": self.images_per_shard,
            "strict_boxes": self.strict_boxes,
            "source_files": json_sha256(
                [_identity(str(getattr(source, "path", ""))) for source in self.sources]
            ),
            "units": json_sha256(units),
            **self.options,
        }


def _identity(path: str) -> list[Any]:
    """Return what changes if a source is replaced: its path with size and mtime of a file or of a
    store's manifest, or with a hash over those of all files in any other folder.
    """
    place = Path(path) / MANIFEST if (Path(path) / MANIFEST).is_file() else Path(path)
    if not place.is_dir():
        return [path, *_size_and_time(place)] if place.exists() else [path]

    digest = hashlib.sha256()
    for folder, below, names in os.walk(place):
        below.sort()
        for name in sorted(names):
            if name != LMDB_LOCK:
                digest.update(
                    json.dumps([folder, name, *_size_and_time(Path(folder, name))]).encode()
                )

    return [path, digest.hexdigest()]


def _size_and_time(path: Path) -> tuple[int, int]:
    found = path.stat() if path.exists() else path.lstat()  # a link may be broken
    return found.st_size, found.st_mtime_ns


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
        if not os.path.isfile(path):
            raise UsageError(f"--captions {path}: no such file")

    facts = _common_facts(plan)
    units = [
        (number, unit)
        for number, source in enumerate(plan.sources)
        for unit in source.units(plan.images_per_shard)
    ]
    work = output.with_name(output.name + ".partial")

    with BuildFolder(work, plan.fingerprint(units), restart), _one_line_for_the_disk(work):
        if not (work / MANIFEST).exists():
            table = _caption_table(plan, work)
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
            _run_jobs(left, len(jobs), plan.sources, workers, max_dropped)
            _finish(plan, facts, work, len(jobs), max_dropped)

        return _publish(work, output, bool(plan.vocabulary))


@contextlib.contextmanager
def _one_line_for_the_disk(work: Path) -> Iterator[None]:
    """Turn errors of the disk at any stage of a build (shards, captions, tokens, manifest, the last
    rename) into a one-line UsageError.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise UsageError(
            f"{work}: cannot be read or written ({error}); free disk space or fix permissions;"
            " finished shards are kept: the same command resumes"
        ) from error


def _publish(work: Path, output: Path, has_vocabulary: bool) -> dict[str, Any]:
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


class BuildFolder:
    """Hold the locked work folder of a build, new or left behind by the same plan, as a context
    manager.
    """

    def __init__(self, work: Path, fingerprint: dict[str, Any], restart: bool) -> None:
        self.work = work
        self.fingerprint = fingerprint
        self.restart = restart

    def __enter__(self) -> None:
        try:
            self.handle = lock_folder(
                self.work,
                "another process is building there; wait for it or choose another --output",
            )
        except OSError as error:
            raise UsageError(f"--output: cannot make {self.work} ({error})") from error

        try:
            self._resume_or_begin()
        except BaseException:
            os.close(self.handle)
            raise

    def _resume_or_begin(self) -> None:
        """Resume what the same plan has left, or start over; raise UsageError for another plan."""
        refuse_strangers(self.work, OURS)
        remove_own(self.work, [name for name in OURS if name.endswith((".new", ".partial"))])
        plan = self.work / PLAN

        if not plan.exists() and own_names(self.work, OURS):
            raise UsageError(
                f"{self.work}: exists and is not an unfinished build of this tool; remove it or"
                " choose another --output"
            )

        if self.restart:
            remove_own(self.work, OURS)

        before = read_json(plan, "plan of the build") if plan.exists() else self.fingerprint
        if before != self.fingerprint:
            changed = [
                name for name, value in before.items() if self.fingerprint.get(name) != value
            ]
            raise UsageError(
                f"{self.work}: left by a build with other settings ({', '.join(changed)} differ);"
                " give the same settings to resume it, or --restart to start over"
            )

        write_text(plan, json.dumps(self.fingerprint, indent=1))

    def __exit__(self, *failure: Any) -> None:
        useful = list(self.work.glob("shard-*.json")) or (self.work / MANIFEST).exists()
        if any(failure) and self.work.exists() and not useful:
            remove_folder(self.work, OURS)  # it holds nothing to resume from
        os.close(self.handle)


def _caption_table(plan: BuildPlan, work: Path) -> CaptionTable | None:
    """Write captions and wanted ids to disk once, and open them; None if there are neither."""
    path = work / "images.db"
    done = work / CAPTIONS_DONE
    if not plan.caption_files and plan.only is None:
        return None
    if not done.exists():
        complaints: list[str] = []
        table = CaptionTable.create(
            path,
            plan.caption_files,
            plan.captions_format,
            plan.split,
            complaints.append,
            plan.only or (),
        )
        if plan.caption_files and not len(table):
            raise UsageError(
                f"--captions {', '.join(plan.caption_files)}: no captions found"
                f" ({(complaints or ['empty'])[0]})"
            )

        write_text(done, json.dumps(complaints))

    return CaptionTable(path)


def _run_jobs(
    jobs: list[UnitJob], total: int, sources: list[FeatureSource], workers: int, max_dropped: float
) -> None:
    """Convert all units, in this process or several; raise UsageError early if, after 10,000
    images, more than the share `max_dropped` is dropped.
    """
    counts: Counter[str] = Counter()

    with progress(total=total, initial=total - len(jobs), unit="shard", desc="building") as bar:
        for done in _results(jobs, sources, workers):
            counts.update(read=done["read"], faults=done["faults"])
            bar.update()
            bar.set_postfix(images=counts["read"], dropped=counts["faults"], refresh=False)
            if counts["read"] > 10_000 and counts["faults"] > max_dropped * counts["read"]:
                raise UsageError(
                    _too_many(counts["faults"], counts["read"], done["reasons"], max_dropped)
                )


def _results(
    jobs: list[UnitJob], sources: list[FeatureSource], workers: int
) -> Iterator[dict[str, Any]]:
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield convert_unit(job, sources)
        return

    # spawn: no handle, lock or thread of this process is inherited
    context = multiprocessing.get_context("spawn")
    with keeping_interrupts() as check:
        pool = ProcessPoolExecutor(
            min(workers, len(jobs)), context, initializer=_start_process, initargs=(sources,)
        )
        waiting = iter(jobs)
        running = set[Future]()

        try:
            while True:
                with interrupts_blocked():
                    while len(running) < 2 * workers and (job := next(waiting, None)) is not None:
                        running.add(pool.submit(_convert, job))

                check()
                if not running:
                    return

                done, running = wait(running, LOOK, FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise TrainingStopped(
                "a process of the build has died (killed, or out of memory?); finished shards are"
                " kept: the same command resumes; give fewer --workers if memory ran out"
            ) from error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.kill()  # safe at any moment: a unit is either marked as done or redone
            raise
        finally:
            pool.shutdown(cancel_futures=True)


_sources: list[FeatureSource] = []  # in a process of the pool: sent once, not with each job


def _convert(job: UnitJob) -> dict[str, Any]:
    return convert_unit(job, _sources)


def _start_process(sources: list[FeatureSource]) -> None:
    """Keep the sources, and watch the parent: without that, a process would wait for work for ever
    after its parent was killed.
    """
    _sources[:] = sources
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _too_many(faults: int, read: int, reasons: dict[str, int], limit: float) -> str:
    reason = max((r for r in reasons if r not in EXPECTED), key=lambda r: reasons[r], default="")
    return (
        f"{faults} of {read} images cannot be used, mostly: {reason}; more than --max-dropped"
        f" {limit}. Fix the input or the flags, or allow more with a higher --max-dropped (finished"
        " shards are kept)"
    )


def _finish(
    plan: BuildPlan, facts: SourceFacts, work: Path, units: int, max_dropped: float
) -> None:
    """Finish everything except the last rename: drop repeated images, add up totals, and write
    report, captions and manifest.
    """
    entries = []
    totals = Counter()
    reasons = Counter()
    labels: dict[str, list[str]] = {}  # of each image, by shard

    for number in range(units):
        done = _read_json(done_file(work, number))
        if done["entry"]:
            entries.append(done["entry"])
            labels[done["entry"]["file"]] = [sys.intern(kind) for kind in done["labels"]]

        totals.update({name: done[name] for name in ("read", "repaired", "inverted", "faults")})
        reasons.update(done["reasons"])

    if not entries:
        _explain_nothing(plan, work, totals["read"], reasons, units)
    if totals["faults"] > max_dropped * totals["read"]:
        raise UsageError(_too_many(totals["faults"], totals["read"], reasons, max_dropped))

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
        lines = _read_json(path)
        if not TEXTS.fits(lines):
            raise UsageError(
                f"{path}: damaged (expected {TEXTS.words}); start the build over with --restart"
            )

        for line in lines:
            yield {"where": line, "image_id": "", "reason": "caption line", "details": ""}


def _dropped(work: Path, units: int) -> Iterator[dict[str, str]]:
    for number in range(units):
        yield from _read_json(done_file(work, number))["dropped"]


def _twice(images: list[tuple[str, int, str]]) -> Iterator[dict[str, str]]:
    for file, row, name in images:
        yield {"where": f"{file}: image {row}", "image_id": name, "reason": TWICE, "details": ""}


def _write_report(path: Path, lines: Iterator[dict[str, str]]) -> None:
    """Write the report line by line: a part of a large store may drop millions of images."""
    with whole_file(path) as handle:
        for line in lines:
            handle.write(encoded(json.dumps(line, ensure_ascii=False) + "\n"))


def _read_json(path: Path) -> Any:
    text = read_text(path, "unfinished build")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: damaged ({error}); start the build over with --restart"
        ) from error


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
