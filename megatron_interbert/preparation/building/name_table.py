"""Keep the names that captions or a list give to images in a database, and find those that mean a
given image.
"""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_interbert.data.image_names import (
    NUMBER,
    SAME,
    ImageName,
    are_different_images,
    kind_of_key,
    paths_differ,
)

SCHEMA = """
    CREATE TABLE {0}_name (
        id INTEGER PRIMARY KEY, target INTEGER, place INTEGER, text TEXT, coco INTEGER
    );
    CREATE TABLE {0}_key (key TEXT, name INTEGER);
    CREATE TABLE {0}_unclear (key TEXT PRIMARY KEY) WITHOUT ROWID;
"""
STEP = 10_000  # rows written at a time


@dataclass(frozen=True)
class Meaning:
    """Hold how a target (whatever the names belong to) means an image.

    `place` is that of its name, 0 for the most reliable one. `key` must mean one image in the
    build; it is empty if the names are equal. `other_spelling` says that the image is named by a
    plain number and the target by COCO, or the other way round.
    """

    target: int
    place: int
    kind: int
    key: str
    other_spelling: bool = False

    @property
    def rank(self) -> int:
        """Return how reliable this is, the lower the better: a more reliable name counts more than
        a stricter key, and numbers count least.
        """
        return 2 * self.place + (self.kind == NUMBER)


class NameTable:
    """Hold the names of targets 0, 1, .. in the tables of one `purpose`."""

    def __init__(self, purpose: str) -> None:
        self.purpose = purpose

    def fill(self, connection: sqlite3.Connection, targets: Iterable[Sequence[str]]) -> None:
        """Write the names of the targets, each with its most reliable name first; "" is none."""
        connection.executescript(SCHEMA.format(self.purpose))
        names: list[tuple[int, int, int, str, bool]] = []
        keys: list[tuple[str, int]] = []
        number = 0

        for target, of_target in enumerate(targets):
            coco = ImageName(of_target[0]).is_coco
            for place, text in enumerate(dict.fromkeys(of_target)):
                if not text:
                    continue
                names.append((number, target, place, text, coco))
                keys += [(key, number) for key in ImageName(text).own_keys]
                number += 1

            if len(names) >= STEP:
                self._write(connection, names, keys)

        self._write(connection, names, keys)
        self._set_unclear_keys_aside(connection)
        connection.execute(f"CREATE INDEX {self.purpose}_by_key ON {self.purpose}_key (key, name)")

    def _write(
        self,
        connection: sqlite3.Connection,
        names: list[tuple[int, int, int, str, bool]],
        keys: list[tuple[str, int]],
    ) -> None:
        connection.executemany(f"INSERT INTO {self.purpose}_name VALUES (?, ?, ?, ?, ?)", names)
        connection.executemany(f"INSERT INTO {self.purpose}_key VALUES (?, ?)", keys)
        names.clear()
        keys.clear()

    def _set_unclear_keys_aside(self, connection: sqlite3.Connection) -> None:
        """Note the keys by which the names mean different images, so that they count no more."""
        key = f"{self.purpose}_key"
        name = f"{self.purpose}_name"
        several = connection.execute(
            f"SELECT key, place FROM {key} JOIN {name} ON {name}.id = {key}.name GROUP BY key,"
            " place HAVING min(text) <> max(text)"
        ).fetchall()
        connection.execute(f"CREATE INDEX {self.purpose}_first ON {key} (key, name)")

        for shared, place in several:
            texts = connection.execute(
                f"SELECT text FROM {key} JOIN {name} ON {name}.id = {key}.name WHERE key = ? AND"
                " place = ?",
                (shared, place),
            )
            with contextlib.closing(texts):  # most of a long list need not be read
                unclear = are_different_images((text for (text,) in texts), kind_of_key(shared))
            if unclear:
                connection.execute(
                    f"INSERT OR IGNORE INTO {self.purpose}_unclear VALUES (?)", (shared,)
                )

        connection.execute(
            f"DELETE FROM {key} WHERE key NOT LIKE 'file:%' AND key IN (SELECT key FROM"
            f" {self.purpose}_unclear)"
        )
        connection.execute(f"DROP INDEX {self.purpose}_first")

    def meanings(self, connection: sqlite3.Connection, image_id: str) -> Iterator[Meaning]:
        """Yield how targets mean an image, supposing that it is the only one with its keys: for
        each name of a target the strictest way.
        """
        image = ImageName(image_id)
        best: dict[tuple[int, int], Meaning] = {}

        for key, unique, kind in image.other_keys():
            for target, place, text, coco in self._named(connection, key):
                other = bool(image.number) and bool(coco) != image.is_coco
                found = Meaning(target, place, SAME, "", other)
                if text != image_id:
                    if self._is_unclear(connection, unique) or self._is_unclear(connection, key):
                        continue
                    if paths_differ(ImageName(text), image):
                        continue
                    found = Meaning(target, place, kind, unique, other)

                known = best.get((target, place))
                if known is None or found.kind < known.kind:
                    best[target, place] = found

        yield from best.values()

    def unclear_keys(self, connection: sqlite3.Connection) -> Iterator[tuple[int, str]]:
        """Yield (target, key) of the names' keys that count no more."""
        unclear = {key for (key,) in connection.execute(f"SELECT key FROM {self.purpose}_unclear")}
        if not unclear:
            return

        for target, text in connection.execute(f"SELECT target, text FROM {self.purpose}_name"):
            for key in unclear.intersection(ImageName(text).own_keys):
                yield target, key

    def _named(self, connection: sqlite3.Connection, key: str) -> list[tuple[int, int, str, int]]:
        name = f"{self.purpose}_name"
        return connection.execute(
            f"SELECT target, place, text, coco FROM {self.purpose}_key JOIN {name} ON {name}.id ="
            f" {self.purpose}_key.name WHERE key = ? ORDER BY target, place",
            (key,),
        ).fetchall()

    def _is_unclear(self, connection: sqlite3.Connection, key: str) -> bool:
        return bool(
            connection.execute(
                f"SELECT 1 FROM {self.purpose}_unclear WHERE key = ?", (key,)
            ).fetchall()
        )
