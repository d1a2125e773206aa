"""Keep captions and wanted images in a database file (SQLite), so that millions of them take no
memory and all processes of a build share them.
"""

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.captions.reading import (
    Caption,
    CaptionFile,
    Complaint,
)
from megatron_interbert.preparation.building.name_table import Meaning, NameTable

SCHEMA = """
    PRAGMA journal_mode=OFF;
    PRAGMA synchronous=OFF;
    CREATE TABLE caption (target INTEGER, text TEXT, language TEXT);
    CREATE TABLE kind (target INTEGER PRIMARY KEY, number INTEGER);
"""
CAPTIONS = NameTable("caption")
WANTED = NameTable("wanted")
STEP = 10_000  # captions written at a time


def check_files(files: Sequence[CaptionFile], split: str) -> None:
    """Raise UsageError for files that cannot share a table, or for --split without splits."""
    by_line = [file.path for file in files if file.by_line]
    if sum(file.wrapped.files for file in files if file.by_line) > 1:
        raise UsageError(
            f"--captions {', '.join(by_line)}: these files name images by line number, so images of"
            " different files would be confused; build a store from each, then join the stores"
        )

    if split and not any(file.has_splits for file in files):
        raise UsageError(
            f"--split {split}: {', '.join(file.path for file in files)} hold no splits, which"
            " records name in a field such as split (Karpathy's do); leave --split out"
        )


def _check_splits(files: Sequence[CaptionFile], split: str) -> None:
    """Raise UsageError for a split that no record is of."""
    seen = set().union(*(file.splits for file in files)) - {""}
    for wanted in filter(None, split.split(",")):
        if wanted not in seen:
            raise UsageError(
                f"--split {split}: no record is of '{wanted}', there are {', '.join(sorted(seen))}"
            )


class CaptionTable:
    """Look up captions by what they are of, a target: the images that one record names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_connection": None}

    @classmethod
    def create(
        cls,
        path: Path,
        files: Sequence[CaptionFile],
        split: str = "",
        complain: Callable[[Complaint], None] = lambda complaint: None,
        wanted: Iterable[str] = (),
    ) -> "CaptionTable":
        """Read caption files and wanted image ids into a new table.

        `complain` is called for each record that cannot be used.
        """
        path.unlink(missing_ok=True)
        check_files(files, split)

        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.executescript(SCHEMA)
            captions = (
                (number, caption)
                for number, file in enumerate(files)
                for caption in file.captions(split)
            )
            CAPTIONS.fill(connection, _write(connection, captions, complain))
            connection.execute("CREATE INDEX by_target ON caption (target)")
            _check_splits(files, split)
            WANTED.fill(connection, ([name] for name in dict.fromkeys(wanted)))

        return cls(path)

    @property
    def connection(self) -> sqlite3.Connection:
        """Return this process's connection to the file, which is only read."""
        if self._connection is None:
            address = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
            self._connection = sqlite3.connect(address, uri=True)

        return self._connection

    def __len__(self) -> int:
        return self.connection.execute("SELECT count(*) FROM caption").fetchone()[0]

    def counts(self) -> np.ndarray:
        """Return the number of captions of each target, int64 [targets]."""
        rows = self.connection.execute(
            "SELECT count(*) FROM caption GROUP BY target ORDER BY target"
        )

        return np.fromiter((count for (count,) in rows), np.int64)

    def kinds(self) -> np.ndarray:
        """Return the kind of each target, int64 [targets]: of a kind are those of one file whose
        names are from the same fields.
        """
        rows = self.connection.execute("SELECT number FROM kind ORDER BY target")
        return np.fromiter((number for (number,) in rows), np.int64)

    def targets_of(self, image_id: str) -> list[Meaning]:
        """Return how targets mean an image, if it is the only one with its keys."""
        return list(CAPTIONS.meanings(self.connection, image_id))

    def unclear_keys(self) -> Iterator[tuple[int, str]]:
        """Yield (target, key) of the keys by which captions name different images."""
        return CAPTIONS.unclear_keys(self.connection)

    def captions_of(self, targets: Iterable[int]) -> list[tuple[str, str]]:
        """Return (text, language) of the captions of targets, in the order of the files."""
        rows = [
            row
            for target in targets
            for row in self.connection.execute(
                "SELECT rowid, text, language FROM caption WHERE target = ?", (int(target),)
            )
        ]

        return [(text, language) for _, text, language in sorted(rows)]

    def of_image(self, image_id: str) -> list[tuple[str, str]]:
        """Return (text, language) of an image's captions, if it is the only one with its keys."""
        return self.captions_of(most_reliable(self.targets_of(image_id)))

    def wanted_as(self, image_id: str) -> list[Meaning]:
        """Return how the list of wanted images means an image."""
        return list(WANTED.meanings(self.connection, image_id))

    def wanted_names(self) -> dict[int, str]:
        """Return the names in the list of wanted images, by their numbers."""
        return dict(self.connection.execute("SELECT target, text FROM wanted_name ORDER BY target"))

    def name_of(self, target: int) -> str:
        """Return the most reliable name of a target."""
        return self.connection.execute(
            "SELECT text FROM caption_name WHERE target = ? AND place = 0", (int(target),)
        ).fetchone()[0]


def most_reliable(meanings: Sequence[Meaning]) -> list[int]:
    """Return the targets that mean an image in the most reliable way."""
    best = min((meaning.rank for meaning in meanings), default=0)
    return sorted({meaning.target for meaning in meanings if meaning.rank == best})


def _write(
    connection: sqlite3.Connection,
    captions: Iterable[tuple[int, Caption | Complaint]],
    complain: Callable[[Complaint], None],
) -> Iterator[list[str]]:
    """Write captions, and yield the names of each new target: of captions that follow each other
    and have the same names.
    """
    rows: list[tuple[int, str, str]] = []
    kinds: dict[tuple[int, tuple[str, ...]], int] = {}
    target = -1
    names: list[str] = []

    for file, caption in captions:
        if isinstance(caption, Complaint):
            complain(caption)
            continue

        if caption.names != names:
            target += 1
            names = caption.names
            kind = kinds.setdefault((file, caption.named_by), len(kinds))
            connection.execute("INSERT INTO kind VALUES (?, ?)", (target, kind))
            yield names

        rows.append((target, caption.text, caption.language))
        if len(rows) >= STEP:
            connection.executemany("INSERT INTO caption VALUES (?, ?, ?)", rows)
            rows.clear()

    connection.executemany("INSERT INTO caption VALUES (?, ?, ?)", rows)
