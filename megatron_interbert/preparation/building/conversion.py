"""Convert one unit of work of a build: read its images, keep those that can be used, write one
shard, and report what was dropped and why.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.data.manifest import entry_fits
from megatron_interbert.data.regions import Regions
from megatron_interbert.errors import Unreadable
from megatron_interbert.files import own_name, whole_file
from megatron_interbert.preparation.building.captions.reading import REJECTED
from megatron_interbert.preparation.building.captions.table import CaptionTable
from megatron_interbert.preparation.building.joining import AGAIN, MERGED, NO_CAPTION, NOT_WANTED
from megatron_interbert.preparation.building.shard_writer import (
    SHARD_NAME,
    prepare_record,
    storable,
    write_shard,
)
from megatron_interbert.preparation.building.sources.base import (
    NO_NAME,
    Dropped,
    FeatureSource,
    Record,
    SourceFacts,
)
from megatron_interbert.reading import is_there, reading

# dropped on purpose, not because of a fault
EXPECTED = (NO_CAPTION, NOT_WANTED, NO_NAME, REJECTED, AGAIN, MERGED)


@dataclass
class UnitJob:
    """Hold what a process needs, beside the sources, to convert one unit to one shard; it is small,
    because there are thousands.
    """

    source: int  # index in the list of sources
    unit: Any
    number: int
    folder: Path
    facts: SourceFacts
    table: CaptionTable | None
    use_captions: bool
    only: bool
    soft_labels: int
    strict_boxes: bool


def done_file(work: Path, number: int) -> Path:
    """Return the path of the file that marks a unit as done, written after its shard."""
    return work / (SHARD_NAME.format(number) + ".json")


MARK = {
    "read": int,
    "repaired": int,
    "inverted": int,
    "faults": int,
    "labels": list,
    "reasons": dict,
    "dropped": list,
}
LINE = {"where", "image_id", "reason", "details"}  # of an image that was dropped


def is_done(work: Path, number: int) -> bool:
    """Check whether a unit is done: its mark is intact, and its shard exists with the right size.

    Prints a note if one of them is damaged, in which case the unit must be done again.
    """
    path = done_file(work, number)

    try:
        with reading(path):
            done = json.loads(path.read_bytes())
            fits = _is_mark(done) and _has_shard(work, number, done)
    except Unreadable:
        raise
    except FileNotFoundError:
        if not is_there(path):
            return False
        fits = False
    except (ValueError, RecursionError):
        fits = False

    if not fits:
        print(
            f"note: {path}: damaged, or its shard is; this part of the build is done again",
            file=sys.stderr,
            flush=True,
        )

    return fits


def _is_mark(done: Any) -> bool:
    if not isinstance(done, dict) or "entry" not in done:
        return False
    if not all(isinstance(done.get(name), kind) for name, kind in MARK.items()):
        return False

    counts = all(isinstance(count, int) for count in done["reasons"].values())
    lines = all(isinstance(line, dict) and line.keys() == LINE for line in done["dropped"])

    return counts and lines and all(isinstance(label, str) for label in done["labels"])


def _has_shard(work: Path, number: int, done: dict[str, Any]) -> bool:
    """Check whether the shard of a unit matches its entry; a unit without images has no shard."""
    entry = done["entry"]
    path = work / SHARD_NAME.format(number)
    if entry is None:
        return True
    if (
        not entry_fits(entry)
        or entry["file"] != path.name
        or entry["images"] != len(done["labels"])
    ):
        return False

    return path.stat().st_size == entry["bytes"]


def convert_unit(job: UnitJob, sources: Sequence[FeatureSource]) -> dict[str, Any]:
    """Write the shard of one unit (none if no image is kept), then the file that marks it as done;
    return that file's content.
    """
    records = []
    report = []
    counts: Counter[str] = Counter()
    labels: list[str] = []
    started = time.perf_counter()

    for found in sources[job.source].read(job.unit):
        counts["read"] += 1
        kept = _keep(found, job)
        if isinstance(kept, Dropped):
            report.append(kept)
            continue

        ready, captions = kept
        records.append((ready.regions, captions))
        labels.append(found.labels or job.facts.soft_labels)
        counts["repaired"] += ready.repaired
        counts["inverted"] += ready.inverted

    path = job.folder / SHARD_NAME.format(job.number)
    reasons = Counter(dropped.reason for dropped in report)
    read = time.perf_counter()
    entry = write_shard(path, records) if records else None
    seconds = {"reading": read - started, "writing": time.perf_counter() - read}
    done = {
        **{name: counts[name] for name in ("read", "repaired", "inverted")},
        "faults": sum(n for reason, n in reasons.items() if reason not in EXPECTED),
        "entry": entry,
        "labels": labels,
        "reasons": dict(sorted(reasons.items())),
        "dropped": [vars(dropped) for dropped in report],
        "seconds": {**seconds, **getattr(sources[job.source], "seconds", {})},
    }
    write_mark(done_file(job.folder, job.number), done)

    return done


def write_mark(path: Path, done: dict[str, Any]) -> None:
    """Write the file that marks a unit as done.

    Its temporary name is this process's own: a worker may outlive a killed build and finish the
    unit that the resumed build converts again.
    """
    with whole_file(path, own_name(path)) as handle:
        handle.write(json.dumps(done).encode())


def _keep(found: Record | Dropped, job: UnitJob) -> Any:
    """Return (prepared record, captions) of an image to keep, or Dropped with the reason."""
    if isinstance(found, Dropped):
        return found

    image_id = found.regions.image_id
    if not storable(image_id):
        return Dropped(found.where, repr(image_id)[:80], "image id is not valid text")
    if job.only and not job.table.wanted_as(image_id):
        return Dropped(found.where, image_id, NOT_WANTED)

    captions = job.table.of_image(image_id) if job.use_captions else found.captions
    if job.use_captions and not captions:
        return Dropped(found.where, image_id, NO_CAPTION)

    regions = found.regions
    fitted = Regions(
        image_id,
        regions.size,
        regions.features,
        regions.boxes,
        *fit_labels(regions, job.soft_labels, job.facts.num_classes),
        *fit_attributes(regions, job.facts.num_attributes),
    )
    facts = job.facts
    ready = prepare_record(fitted, facts.feature_dim, facts.num_classes, facts.num_attributes)
    if ready.problem:
        return Dropped(found.where, image_id, ready.problem, ready.details)
    if ready.repaired and job.strict_boxes:
        return Dropped(
            found.where, image_id, "boxes outside the image or inverted", f"{ready.repaired}"
        )

    return ready, captions


def fit_attributes(regions: Regions, number: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the attributes that a store with so many keeps; regions without any get the first one,
    with a confidence of 0.
    """
    if not number:
        return None, None
    if regions.attribute_ids is not None:
        return regions.attribute_ids, regions.attribute_probs

    shape = (len(regions.features), 1)
    return np.zeros(shape, np.int32), np.zeros(shape, np.float32)


def fit_labels(regions: Regions, width: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut soft labels to their first `width` entries, or pad them with classes of probability 0."""
    ids = np.asarray(regions.class_ids)
    probs = np.asarray(regions.class_probs)
    width = min(width, num_classes)
    if ids.ndim != 2 or ids.shape != probs.shape or ids.shape[1] >= width:
        return ids[..., :width], probs[..., :width]

    missing = width - ids.shape[1]
    fill = np.array(
        [
            [c for c in range(num_classes) if c not in row][:missing]
            for row in (set(r.tolist()) for r in ids)
        ],
        ids.dtype,
    )

    return np.concatenate([ids, fill.reshape(len(ids), missing)], 1), np.concatenate(
        [probs, np.zeros((len(ids), missing), probs.dtype)], 1
    )
