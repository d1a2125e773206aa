"""Hold the samples of a task as read from its official files, before images and answers get
numbers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.drops import Drops
from megatron_interbert.tasks.image_finder import find_images


@dataclass(slots=True)
class Record:
    """Hold one sample: its id, pieces of text, names of its images, and the scores (0 to 1) of its
    right answers, empty if they are unknown. `facts` are what only the task's metrics need.
    """

    id: str
    texts: tuple[str, ...]
    images: tuple[str, ...]
    answers: Mapping[str, float]
    facts: Any = None


@dataclass
class Records:
    """Hold the usable samples of some files, the numbers of their images in a corpus, int64 [n,
    images each], and what was dropped.
    """

    files: str
    items: list[Record]
    images: np.ndarray
    drops: Drops = field(default_factory=Drops)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labelled(self) -> bool:
        """Return whether the right answers of all samples are known."""
        return all(record.answers for record in self.items)

    def report(self) -> str:
        """Return a line such as `FILES: 120 samples; dropped 3: REASON (first: 458752000)`."""
        return f"{self.files}: {len(self)} samples{self.drops}"

    def take(self, rows: Sequence[int]) -> "Records":
        """Return some of the samples, with all that was dropped."""
        return Records(self.files, [self.items[row] for row in rows], self.images[rows], self.drops)

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
    files: str, records: Iterable[Record | tuple[str, str]], corpus: Corpus, whole: bool = False
) -> Records:
    """Find the images of records; those with an image that the corpus lacks are dropped.

    Instead of a record there may be (id, reason) of a sample that cannot be used. If `whole`,
    because every sample must be answered, a drop raises UsageError; so does a file of which nothing
    is left.
    """
    given = list(records)
    usable = [record for record in given if isinstance(record, Record)]
    numbers = find_images(corpus, (name for record in usable for name in record.images))
    drops = Drops()
    items: list[Record] = []

    for record, reason in judged(given, numbers):
        if record is not None:
            items.append(record)
            continue

        sample, why = reason
        drops.add(why, sample)
        if whole:
            raise UsageError(f"{files}: {sample}: {why}; every sample must be answered")

    images = [[numbers[name] for name in record.images] for record in items]
    found = Records(files, items, np.array(images, np.int64), drops)
    if not items:
        raise UsageError(
            f"{found.report()}; nothing is left: give the region stores that hold the images of"
            f" these samples (now {corpus.path})"
        )

    return found


def judged(
    given: Iterable[Record | tuple[str, str]], numbers: Mapping[str, int]
) -> Iterator[tuple[Record | None, tuple[str, str]]]:
    """Yield (record, ("", "")) of samples that can be used, and (None, (id, reason)) of others."""
    for entry in given:
        if not isinstance(entry, Record):
            yield None, entry
        elif all(name in numbers for name in entry.images):
            yield entry, ("", "")
        else:
            yield None, (entry.id, "its image is not in the region store")


def refuse_repeated(records: Sequence[Record | tuple[str, str]], files: str) -> None:
    """Raise UsageError if two records have one id, which answers could not tell apart."""
    seen: set[str] = set()
    for record in records:
        name = record.id if isinstance(record, Record) else record[0]
        if name in seen:
            raise UsageError(f"{files}: {name} is there twice; give each file once")
        seen.add(name)
