"""Write and read the versions of an index of items on disk.

    INDEX/<version>/vectors.faiss   vectors, by the number of their item in items.jsonl
    INDEX/<version>/items.jsonl     the items
    INDEX/<version>/manifest.json   its number, the journal's place when the items were read,
                                    sha256 of the weights and of both files
    INDEX/current                   link to the version that is served
    INDEX/journal.jsonl             what was added, changed and removed, in order (journal.py)
    INDEX/journal.end               the last change that was confirmed

A version is written under another name, flushed and renamed, and then the link is swapped: readers
see a whole version, old or new. It belongs to the weights that made its vectors; with others it is
refused. Its items are those of items.jsonl plus all changes in the journal after its place, so no
change is lost, whichever version is served.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import faiss
import numpy as np

from megatron_interbert.errors import Unreadable, UsageError
from megatron_interbert.files import (
    file_sha256,
    flush_file,
    flush_folder,
    point_to,
    publish_folder,
    sibling,
    write_json,
    write_text,
)
from megatron_interbert.reading import list_folder, reading, refuse_constant
from megatron_interbert.serving.items import Item, item_of
from megatron_interbert.serving.journal import JOURNAL, collapsed, has_changes, read_journal
from megatron_interbert.serving.journal_format import Mark
from megatron_interbert.serving.own_files import open_own, read_own
from megatron_interbert.serving.vector_file import Foreign, Stored, read_vectors
from megatron_interbert.serving.vector_index import KINDS, VectorIndex
from megatron_interbert.weights.manifest import seal

CURRENT = "current"
VECTORS = "vectors.faiss"
ITEMS = "items.jsonl"
FACTS = "manifest.json"
NAME = re.compile(r"[0-9a-f]{12}")
log = logging.getLogger("megatron_interbert.serving")
ANEW = "begin anew from your items (--rebuild --items FILE), which drops the changes"


class Damaged(UsageError):
    """Represent a version that is damaged; `problem` says how, without what to do about it."""

    def __init__(self, problem: str) -> None:
        ways_out = (
            "restore it from a backup, or build a new version from its items or from those of the"
            f" version before it (--build-only), or, if neither can be read, {ANEW}"
        )
        super().__init__(f"{problem}; {ways_out}")
        self.problem = problem


class Version:
    """Read a version of the index from its folder, checking everything that is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.facts = self._read_facts()
        self._check_facts()
        self.number: int = self.facts.get("number", 0)  # versions are ordered by it
        # the journal's changes after this place are not in the version
        self.mark = mark_of(self.facts["journal"])

    def _read_facts(self) -> dict[str, Any]:
        """Read the manifest; raises UsageError if it is missing or not a JSON object."""
        where = self.path / FACTS

        try:
            facts = json.loads(read_own(where), parse_constant=refuse_constant)
        except UsageError:
            raise
        except OSError:
            raise Damaged(f"{where}: missing") from None
        except (ValueError, RecursionError):
            facts = None

        if not isinstance(facts, dict):
            raise Damaged(f"{where}: not as it was written")

        return facts

    def _check_facts(self) -> None:
        """Raise UsageError for a manifest that is damaged, or that a version of this package too
        old to be read has made.
        """
        facts = self.facts
        where = self.path / FACTS

        if "journal" not in facts:
            raise UsageError(
                f"{self.path}: made by an earlier version of this package; remove"
                f" {self.path.parent} and begin anew (--items FILE)"
            )

        kinds = {"version": str, "kind": str, "model": dict, "items": int, "sha256": dict}
        sound = (
            all(isinstance(facts.get(name), kind) for name, kind in kinds.items())
            and facts["kind"] in KINDS
        )
        sealed = facts == seal(facts) or type(facts["journal"]) is int
        if not (
            sound
            and sealed
            and mark_of(facts["journal"]) is not None
            and {VECTORS, ITEMS} <= set(facts["sha256"])
        ):
            raise Damaged(f"{where}: not as it was written")

    @contextlib.contextmanager
    def _checked(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file, after checking its sha256 through the same descriptor.

        Raises Damaged if it is missing or corrupt.
        """
        path = self.path / name

        with reading(path):
            try:
                file = open_own(path)
            except OSError:
                raise Damaged(f"{path}: missing") from None

            with file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != self.facts["sha256"][name]:
                    raise Damaged(f"{path}: sha256 differs from {FACTS} (corrupt)")
                file.seek(0)
                yield file

    def is_whole(self) -> bool:
        """Check whether its files are sound and can be served.

        Raises Unreadable if they cannot be read now.
        """
        try:
            with self._checked(ITEMS):
                pass
            self._stored()
        except Unreadable:
            raise
        except UsageError:
            return False

        return True

    def items(self) -> list[Item]:
        """Return the items in items.jsonl, in the order of their vectors."""
        where = self.path / ITEMS
        with self._checked(ITEMS) as file:
            data = file.read()
        try:
            records = [json.loads(line) for line in data.decode().split("\n")[:-1]]
        except (ValueError, RecursionError):
            raise Damaged(f"{where}: not as it was written") from None

        return [item_of(record, str(where)) for record in records]

    def vectors(self) -> VectorIndex:
        """Return the index of the vectors.

        Raises UsageError if the file is not one that we write, even if its sha256 is right.
        """
        with self._ours():
            return VectorIndex.of(self._stored(), self.facts["kind"])

    def _stored(self) -> Stored:
        """Read the vectors; raises UsageError as `vectors` does."""
        with self._checked(VECTORS) as file, self._ours():
            stored = read_vectors(file, self.facts["kind"], os.fstat(file.fileno()).st_size)
            if len(stored.ids) != self.facts["items"]:
                raise Foreign(f"it holds {len(stored.ids)} vectors, expected {self.facts['items']}")
            return stored

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        """Turn Foreign into Damaged, which names the file of vectors."""
        try:
            yield
        except Foreign as error:
            where = self.path / VECTORS
            raise Damaged(f"{where}: not a file of vectors that we wrote ({error})") from None

    def items_now(self) -> tuple[list[Item], Mark]:
        """Return the items with all changes in the journal, and the place after the last one."""
        records, mark = read_journal(self.path.parent, self.mark)
        items = {item.item_id: item for item in self.items()}

        for item_id, item in collapsed(records).items():
            if item is None:
                items.pop(item_id, None)
            else:
                items[item_id] = item

        return list(items.values()), mark


def mark_of(value: Any) -> Mark | int | None:
    """Return the place in the journal that a manifest names, None if it is not sound.

    Earlier versions of this package wrote a number of bytes, which is returned as it is.
    """
    if type(value) is int and value >= 0:
        return value

    kinds = {"journal": str, "place": int, "sum": str}
    if isinstance(value, dict) and {name: type(entry) for name, entry in value.items()} == kinds:
        return Mark(**value)

    return None


def served_version(folder: Path) -> Version | None:
    """Return the version to serve: the one that `current` names, else the newest whole one.

    None if there is no trace of an index. Raises UsageError if there are traces but no version can
    be served, because confirmed changes must not be dropped silently.
    """
    named = sibling(folder / CURRENT)
    if named is not None and NAME.fullmatch(named.name):
        return Version(named)

    names = version_names(folder)
    for version in reversed(versions_in(folder)):
        if version.is_whole():
            log.warning(
                "%s names no version; the newest whole one is %s", folder / CURRENT, version.name
            )
            return version

    if names or has_changes(folder):
        raise UsageError(
            f"{folder}: no version of the index is usable, but there are traces of one"
            f" ({', '.join(names[:3]) or JOURNAL}); restore them from a backup, or begin anew from"
            " your items (--rebuild --items FILE)"
        )

    return None


def version_to_replay(folder: Path) -> tuple[Version, list[Item], Mark] | None:
    """Return what a new version can be built from: a version, its items with all changes, and the
    place after them.

    It is the version that is served, else the newest whose files and changes are all readable; None
    if there is no trace of an index. Raises UsageError if there is no such version.
    """
    problem = None

    try:
        served = served_version(folder)
        if served is None:
            return None
        return served, *served.items_now()
    except Unreadable:
        raise
    except UsageError as error:
        problem = error

    told = problem.problem if isinstance(problem, Damaged) else problem
    for version in reversed(versions_in(folder)):
        try:
            found = version, *version.items_now()
        except Unreadable:
            raise
        except UsageError:
            continue

        log.warning("%s; items are taken from %s, with all changes", told, version.path)
        return found

    if isinstance(problem, Damaged):
        raise UsageError(
            f"{told}, and no version before it is whole; restore it from a backup, or {ANEW}"
        )

    raise problem


def write_version(
    folder: Path,
    items: Sequence[Item],
    vectors: np.ndarray,
    kind: str,
    model: dict[str, Any],
    mark: Mark,
) -> str:
    """Write a new version, make it the current one, and return its name.

    The items, with vectors [n, P], include all changes before the journal's `mark`. If a vector is
    not finite, raises UsageError and writes nothing.
    """
    check_finite(items, vectors)
    index = VectorIndex(vectors.shape[1], kind)
    index.add(range(len(items)), vectors)
    version = uuid.uuid4().hex[:12]
    beside = folder / f".{version}.new"
    beside.mkdir(parents=True)

    try:
        faiss.write_index(index.faiss, str(beside / VECTORS))
        flush_file(beside / VECTORS)
        del index  # as large as the vectors, which are now read once more
        check_readable(beside / VECTORS, kind)
        write_text(
            beside / ITEMS,
            "".join(json.dumps(item.record(), ensure_ascii=False) + "\n" for item in items),
        )
        facts = {
            "version": version,
            "number": 1 + max((old.number for old in versions_in(folder)), default=0),
            "kind": kind,
            "model": model,
            "journal": dataclasses.asdict(mark),
            "items": len(items),
            "sha256": {name: file_sha256(beside / name) for name in (VECTORS, ITEMS)},
        }
        write_json(beside / FACTS, seal(facts))
        publish_folder(beside, folder / version)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise

    serve_from_now_on(folder, version)

    return version


def check_readable(path: Path, kind: str) -> None:
    """Raise UsageError if FAISS has written the vectors in a format other than the one we read."""
    with open(path, "rb") as file:
        try:
            read_vectors(file, kind, path.stat().st_size)
        except Foreign as error:
            raise UsageError(
                f"{path}: FAISS {faiss.__version__} writes another file format ({error}); install"
                " the version in requirements.txt"
            ) from None


def check_finite(items: Sequence[Item], vectors: np.ndarray) -> None:
    """Raise UsageError if a vector has NaN or infinity: its item would never be found."""
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise UsageError(
            f"--load: the model gives {len(wrong)} of {len(items)} items vectors that are not"
            f" finite, the first of item {items[wrong[0]].item_id}; nothing was changed; use other"
            " weights"
        )


def serve_from_now_on(folder: Path, version: str) -> None:
    """Make a version the current one, atomically."""
    link = folder / CURRENT
    if link.is_dir() and not link.is_symlink():  # a folder, in a copy that follows links
        unused = folder / f"unused-{CURRENT}-{uuid.uuid4().hex[:12]}"
        link.rename(unused)
        log.warning(
            "%s is a folder, as in copies that do not keep links; it is kept as %s", link, unused
        )

    point_to(folder / CURRENT, version)
    flush_folder(folder)


def version_names(folder: Path) -> list[str]:
    """Return the names in the folder that look like versions; nothing else there is ours."""
    return [
        name
        for name in list_folder(folder)
        if NAME.fullmatch(name) and not (folder / name).is_symlink()
    ]


def versions_in(folder: Path) -> list[Version]:
    """Return all versions with a sound manifest, oldest first by their numbers, never by the
    clock.
    """
    found = []

    for name in version_names(folder):
        try:
            found.append(Version(folder / name))
        except Unreadable:
            raise
        except Damaged as error:
            log.warning("ignoring a damaged version: %s", error.problem)
        except UsageError as error:
            log.warning("ignoring %s: %s", folder / name, error)

    return sorted(found, key=lambda version: (version.number, old_place(version), version.name))


def old_place(version: Version) -> int:
    """Return a sort key for versions made by earlier versions of this package, which have no
    numbers.
    """
    return version.mark if isinstance(version.mark, int) else 0


def prune(folder: Path, kept: Sequence[str], newest: int = 2) -> None:
    """Remove all versions except the newest few, those in `kept` and the one that is served.

    Only the building process calls it, so two never do it at once. Damaged versions do not count
    among the newest, and what cannot be read is left alone.
    """
    served = sibling(folder / CURRENT)
    kept = [*kept, *([served.name] if served else [])]
    whole = 0

    for version in reversed(versions_in(folder)):
        if whole >= newest and version.name not in kept:
            shutil.rmtree(version.path, ignore_errors=True)
            continue

        try:
            whole += version.is_whole()
        except Unreadable as error:
            log.warning("%s", error)


def needed_from(folder: Path, journal: str) -> int:
    """Return how many of a journal's changes no version in the folder needs any more.

    0 if that is unknown because a version's manifest is damaged or of an earlier kind.
    """
    versions = versions_in(folder)
    marks = [version.mark for version in versions]
    if len(versions) < len(version_names(folder)) or any(isinstance(mark, int) for mark in marks):
        return 0

    return min((mark.place for mark in marks if mark.journal == journal), default=0)
