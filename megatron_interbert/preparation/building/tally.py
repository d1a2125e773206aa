"""Add up what the units of a build have left."""

import bisect
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_interbert.data.hdf5 import Hdf5File
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.build_folder import read_work_file
from megatron_interbert.preparation.building.conversion import EXPECTED, done_file
from megatron_interbert.preparation.building.joining import NO_CAPTION, Images
from megatron_interbert.preparation.building.unit_pool import too_many_dropped


class Tally:
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
        self.totals["faults"] += sum(reason not in EXPECTED for _, reason in rows)

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

    def check(self, max_dropped: float) -> None:
        """Raise UsageError if more than a share `max_dropped` of the images is dropped for
        faults.
        """
        faults = self.totals["faults"]
        read = self.totals["read"]
        if faults > max_dropped * read:
            raise UsageError(too_many_dropped(faults, read, self.reasons, max_dropped))
