"""Find the images of samples in region stores, and keep the samples that can be used."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.drops import Drops

NO_IMAGE = "its image is not in the region store"

Numbers = Mapping[str, tuple[int, ...]]  # of an image in each store, by its name
Find = Callable[[Iterable[str]], Numbers]
Rejected = tuple[str, str]  # id of a sample that cannot be used, and the reason


class AnyRecord(Protocol):
    """Hold one sample as read from a task's files."""

    id: str
    images: tuple[str, ...]

    @property
    def labelled(self) -> bool:
        """Return whether the right answer is known."""


@dataclass
class Records:
    """Hold the usable samples of some files, the numbers of their images, int64 [n, ..], and what
    was dropped; `content` is the sha256 of what was read in folders, if there are such.
    """

    files: str
    items: list[Any]
    images: np.ndarray
    drops: Drops = field(default_factory=Drops)
    content: str = ""

    def __len__(self) -> int:
        return len(self.items)

    def known(self) -> list[int]:
        """Return the samples whose right answers are known."""
        return [row for row, record in enumerate(self.items) if record.labelled]

    def unknown(self) -> list[int]:
        """Return the samples whose right answers are unknown."""
        return [row for row, record in enumerate(self.items) if not record.labelled]

    def unlabelled(self, what: str) -> str:
        """Return a line such as `3 of 120 samples have no answer and do not count (first: 12)`, or
        an empty string if the right answers of all samples are known.
        """
        others = self.unknown()
        if not others:
            return ""

        first = self.items[others[0]].id
        return (
            f"{len(others)} of {len(self)} samples have no {what} and do not count (first: {first})"
        )

    def labelled(self, what: str) -> "Records":
        """Return the samples whose right answers are known, with the others counted as dropped for
        having no `what`; raises UsageError if none is left.
        """
        found = self.take(self.known())
        found.drops = Drops()
        found.drops.take(self.drops)

        for row in self.unknown():
            found.drops.add(f"it has no {what}", self.items[row].id)
        if not len(found):
            raise UsageError(
                f"{found.report()}; nothing is left: give files whose samples have one"
            )

        return found

    def report(self) -> str:
        """Return a line such as `FILES: 120 samples; dropped 3: REASON (first: 458752000)`."""
        return f"{self.files}: {len(self)} samples{self.drops}"

    def take(self, rows: Sequence[int]) -> "Records":
        """Return some of the samples, with all that was dropped."""
        return replace(self, items=[self.items[row] for row in rows], images=self.images[rows])

    @staticmethod
    def join(parts: Sequence["Records"]) -> "Records":
        """Return the samples of several parts as one."""
        drops = Drops()
        for part in parts:
            drops.take(part.drops)

        return Records(
            ", ".join(dict.fromkeys(part.files for part in parts)),
            [record for part in parts for record in part.items],
            np.concatenate([part.images for part in parts]),
            drops,
        )


def place_records(
    files: str,
    records: Iterable[AnyRecord | Rejected],
    find: Find,
    stores: str,
    whole: bool = False,
    check: Callable[[Any, tuple[int, ...]], str] = lambda record, numbers: "",
    beside: Drops | None = None,
) -> Records:
    """Find the images of records in `stores` (their paths, for messages).

    Dropped and counted are records that were rejected when they were read, that have an image which
    is missing, or that do not pass `check`, which returns the reason. If `whole`, because every
    sample must be answered, a drop raises UsageError; so does a file of which nothing is left.
    `beside` are samples that are no part of the task, which are counted as well.
    """
    given = list(records)
    usable = [record for record in given if not isinstance(record, tuple)]
    numbers = find(name for record in usable for name in record.images)
    drops = Drops()
    drops.take(beside or Drops())
    items: list[Any] = []
    images: list[tuple[int, ...]] = []

    for record, name, place, reason in judged(given, numbers):
        why = reason or check(record, place)
        if not why:
            items.append(record)
            images.append(place)
            continue

        # of a missing image, the name that was looked for
        drops.add(why, f"{name}, image {record}" if why == NO_IMAGE else name)
        if whole:
            raise UsageError(f"{files}: {name}: {why}; every sample must be answered")

    found = Records(files, items, np.array(images, np.int64), drops)
    if not items:
        mend = "mend the file, or give another one"
        if NO_IMAGE in drops.counts:
            mend = f"give the region stores that hold the images of these samples (now {stores})"
        raise UsageError(f"{found.report()}; nothing is left: {mend}")

    return found


def judged(
    given: Iterable[AnyRecord | Rejected], numbers: Numbers
) -> Iterator[tuple[Any, str, tuple[int, ...], str]]:
    """Yield (record, its id, the numbers of its images, "") or, for a sample that cannot be used,
    (None, id, (), reason); if it lacks an image, with that image's name for None.
    """
    for entry in given:
        if isinstance(entry, tuple):
            yield None, entry[0], (), entry[1]
        elif all(name in numbers for name in entry.images):
            yield entry, entry.id, tuple(n for name in entry.images for n in numbers[name]), ""
        else:
            missing = next(name for name in entry.images if name not in numbers)
            yield missing, entry.id, (), NO_IMAGE


def refuse_repeated(records: Iterable[AnyRecord | Rejected], files: str) -> None:
    """Raise UsageError if two samples have one id, which answers could not tell apart."""
    seen: set[str] = set()
    for record in records:
        name = record[0] if isinstance(record, tuple) else record.id
        if name in seen:
            raise UsageError(f"{files}: {name} occurs twice; list each file once")
        seen.add(name)
