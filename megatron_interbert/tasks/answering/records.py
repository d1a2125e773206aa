"""Hold the samples of a task that chooses one of fixed answers, as read from its files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.tasks.drops import Drops
from megatron_interbert.tasks.image_finder import find_images
from megatron_interbert.tasks.placing import Records, Rejected, place_records, refuse_repeated


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

    @property
    def labelled(self) -> bool:
        """Return whether the right answers are known."""
        return bool(self.answers)


def place_in(
    corpus: Corpus,
    files: str,
    records: Iterable[Record | Rejected],
    whole: bool = False,
    beside: Drops | None = None,
) -> Records:
    """Find the images of records in a corpus; see `place_records`."""
    given = list(records)
    refuse_repeated(given, files)
    return place_records(files, given, partial(find, corpus), corpus.path, whole, beside=beside)


def find(corpus: Corpus, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the number of each image in a corpus, as the only store."""
    return {name: (number,) for name, number in find_images(corpus, names).items()}
