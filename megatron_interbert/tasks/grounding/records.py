"""Hold the samples of a task that points at regions, as read from its files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_interbert.data.regions import UNKNOWN_SIZE
from megatron_interbert.tasks.drops import Drops
from megatron_interbert.tasks.grounding.boxes import problem_of
from megatron_interbert.tasks.placing import Records, Rejected, place_records, refuse_repeated
from megatron_interbert.tasks.two_stores import TwoStores

NO_BOXES = np.zeros((0, 4), np.float32)


@dataclass(slots=True)
class RegionRecord:
    """Hold one sample: its id, pieces of text, the name of its image (alone in a tuple), that
    image's width and height in pixels (None: as the region store has it), and the boxes [n, 4] that
    are right; none if they are unknown.

    `choices` [c, 4] are the only boxes to choose among, if there are such. `facts` are what only
    the task's metrics need.
    """

    id: str
    texts: tuple[str, ...]
    images: tuple[str, ...]
    size: tuple[float, float] | None
    targets: np.ndarray
    choices: np.ndarray | None = None
    facts: Any = None

    @property
    def labelled(self) -> bool:
        """Return whether the right boxes are known."""
        return len(self.targets) > 0


def place_in(
    stores: TwoStores,
    files: str,
    records: Iterable[RegionRecord | Rejected],
    whole: bool = False,
    beside: Drops | None = None,
) -> Records:
    """Find the images of records in two stores; records with a bad box are dropped as well."""
    given = list(records)
    refuse_repeated(given, files)

    def check(record: RegionRecord, numbers: Sequence[int]) -> str:
        record.size = record.size or stores.size(numbers)
        if record.size == UNKNOWN_SIZE:
            return "the region store does not know the size of its image"

        boxes = [record.targets] if record.choices is None else [record.targets, record.choices]
        return problem_of(np.concatenate(boxes), record.size)

    paths = ", ".join(corpus.path for corpus in stores.corpora)

    return place_records(files, given, stores.find, paths, whole, check, beside)
