"""Vectors of items in FAISS, and the folder in which an index outlives the process that made it.

    INDEX/<version>/vectors.faiss   vectors by the number of their item in items.jsonl
    INDEX/<version>/items.jsonl     the items
    INDEX/<version>/manifest.json   version, parent, sha256 of the model's weights and of both files
    INDEX/<version>/journal.jsonl   what was added, changed and removed since
    INDEX/current                   link to the version that is served

A version is written beside, flushed and renamed, then the link is swapped: a reader sees a whole one, old or new. It belongs to the weights
with which its vectors were made; others are refused. What its parent's journal saw after the items were read for it is still to be taken
over: the first line of its own journal says that it was.
"""

import fcntl
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from megatron_interbert.config import read_json
from megatron_interbert.data.manifest import file_sha256
from megatron_interbert.errors import UsageError
from megatron_interbert.serving.items import Item
from megatron_interbert.weights.files import flush_file, flush_folder, write_json, write_text

CURRENT, VECTORS, ITEMS, FACTS, JOURNAL = "current", "vectors.faiss", "items.jsonl", "manifest.json", "journal.jsonl"
NAME = re.compile(r"[0-9a-f]{12}")
LINKS, BREADTH = 32, 128  # of an HNSW graph; candidates that a search looks at
Record = dict[str, Any]  # {"put": item} or {"remove": item id}; {"taken": [records]} as the first line of a journal


class VectorIndex:
    """Inner products of vectors [P] by place. `exact` compares with all, `hnsw` walks a graph: for millions of items.

    A graph cannot forget a vector: places that are gone are passed over, and a new version forgets them.
    """

    def __init__(self, width: int, kind: str = "exact") -> None:
        inner = faiss.IndexFlatIP(width) if kind == "exact" else faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
        self.kind, self.faiss = kind, faiss.IndexIDMap(inner)
        self.gone: set[int] = set()
        self._lock = threading.Lock()

    @classmethod
    def read(cls, path: Path, kind: str) -> "VectorIndex":
        """Of a file."""
        index = cls(1)
        index.faiss, index.kind = faiss.read_index(str(path)), kind
        return index

    def __len__(self) -> int:
        return self.faiss.ntotal - len(self.gone)

    def add(self, places: Sequence[int], vectors: np.ndarray) -> None:
        """Vectors [n, P] at places that no vector has had."""
        with self._lock:
            self.faiss.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.array(places, np.int64))

    def remove(self, place: int) -> None:
        """Never find this place again."""
        with self._lock:
            if self.kind == "exact":
                self.faiss.remove_ids(np.array([place], np.int64))
            else:
                self.gone.add(place)

    def search(self, vectors: np.ndarray, k: int) -> list[np.ndarray]:
        """Places of the k (or fewer) best items for each vector [n, P], best first."""
        with self._lock:
            most = min(k, len(self))
            if not most:
                return [np.zeros(0, np.int64)] * len(vectors)
            parameters = None
            if self.kind == "hnsw":
                gone = faiss.IDSelectorBatch(np.array(sorted(self.gone), np.int64))
                parameters = faiss.SearchParametersHNSW(sel=faiss.IDSelectorNot(gone), efSearch=max(BREADTH, most))
            _, found = self.faiss.search(np.ascontiguousarray(vectors, np.float32), most, params=parameters)
        return [row[row >= 0] for row in found]


class Version:
    """A version in its folder; what is read of it is checked."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.facts = read_json(path / FACTS, "--index")
        self.parent: dict[str, Any] = self.facts["parent"]

    @classmethod
    def current(cls, folder: Path) -> "Version":
        """The one that is served. UsageError where there is none."""
        if not (folder / CURRENT).is_dir():
            raise UsageError(f"{folder}: no index there; make one with python -m megatron_interbert.serve --build-only")
        return cls((folder / CURRENT).resolve())

    def _checked(self, name: str) -> Path:
        if file_sha256(self.path / name) != self.facts["sha256"][name]:
            raise UsageError(f"{self.path / name}: sha256 differs from {FACTS} (corrupt); build the index again (--build-only)")
        return self.path / name

    def items(self) -> list[Item]:
        """Those that the vectors are of."""
        return [Item(**json.loads(line)) for line in self._checked(ITEMS).read_text(encoding="utf-8").split("\n")[:-1]]

    def vectors(self) -> VectorIndex:
        """Of the items."""
        return VectorIndex.read(self._checked(VECTORS), self.facts["kind"])

    def journal_text(self) -> bytes:
        """The journal's whole lines. A last line that was cut by a crash is none: nobody was told that it had happened."""
        path = self.path / JOURNAL
        text = path.read_bytes() if path.exists() else b""
        return text[: text.rfind(b"\n") + 1]

    def records(self, start: int = 0) -> list[Record]:
        """Its own journal from a byte on, with what it has taken over."""
        found: list[Record] = []
        for line in self.journal_text()[start:].split(b"\n")[:-1]:
            record = json.loads(line)
            found += record.get("taken", [record])
        return found

    @property
    def has_taken(self) -> bool:
        """Whether what its parent saw later stands in its own journal."""
        return not self.parent or self.journal_text().startswith(b'{"taken"')

    def inherited(self) -> list[Record]:
        """What its parents' journals saw after the items were read for it. UsageError where a parent is gone."""
        if not self.parent:
            return []
        path = self.path.parent / self.parent["version"]
        if not (path / FACTS).is_file():
            raise UsageError(f"{self.path}: the version {path.name}, from which it was made, is gone, with changes that came later")
        parent = Version(path)
        return [*([] if parent.has_taken else parent.inherited()), *parent.records(self.parent["journal_bytes"])]

    def changes(self) -> list[Record]:
        """All that came after its items, in order."""
        return self.records() if self.has_taken else [*self.inherited(), *self.records()]

    def items_now(self) -> tuple[list[Item], dict[str, Any]]:
        """The items with all changes, and what a version made of them must say of its parent."""
        bytes_read = len(self.journal_text())
        items = {item.item_id: item for item in self.items()}
        for item_id, item in collapsed(self.changes()).items():
            if item is None:
                items.pop(item_id, None)
            else:
                items[item_id] = item
        return list(items.values()), {"version": self.name, "journal_bytes": bytes_read}


def collapsed(records: Sequence[Record]) -> dict[str, Item | None]:
    """What came last of each item: the item, or None where it was removed."""
    found: dict[str, Item | None] = {}
    for record in records:
        item = Item(**record["put"]) if "put" in record else None
        found.pop(item.item_id if item else record["remove"], None)
        found[item.item_id if item else record["remove"]] = item
    return found


def write_version(
    folder: Path, items: Sequence[Item], vectors: np.ndarray, kind: str, model: dict[str, Any], parent: dict[str, Any]
) -> str:
    """Write items and their vectors [n, P] as a new version and make it the current one; its name.

    `parent`: `version` and `journal_bytes` of the one that the items were read from; empty for a first one.
    """
    index = VectorIndex(vectors.shape[1], kind)
    index.add(range(len(items)), vectors)
    version = uuid.uuid4().hex[:12]
    beside = folder / f".{version}.new"
    beside.mkdir(parents=True)
    try:
        faiss.write_index(index.faiss, str(beside / VECTORS))
        flush_file(beside / VECTORS)
        write_text(beside / ITEMS, "".join(json.dumps(item.record(), ensure_ascii=False) + "\n" for item in items))
        hashes = {name: file_sha256(beside / name) for name in (VECTORS, ITEMS)}
        facts = {"version": version, "kind": kind, "model": model, "parent": parent, "items": len(items), "sha256": hashes}
        write_json(beside / FACTS, facts)
        flush_folder(beside)
        beside.rename(folder / version)
        flush_folder(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    point_to(folder, version)
    return version


def point_to(folder: Path, version: str) -> None:
    """Make a version the current one, in one step."""
    link = folder / f".{version}.link"
    link.unlink(missing_ok=True)
    link.symlink_to(version)
    os.replace(link, folder / CURRENT)
    flush_folder(folder)


def prune(folder: Path, kept: Sequence[str], newest: int = 2) -> None:
    """Remove versions but the newest few and those that are `kept`; whatever else lies in the folder is somebody else's."""
    versions = [
        path for path in folder.iterdir() if NAME.fullmatch(path.name) and (path / FACTS).is_file() and not path.is_symlink()
    ]
    for path in sorted(versions, key=lambda path: path.stat().st_mtime)[:-newest]:
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def alone(path: Path, what: str) -> Iterator[int]:
    """A file that only this process works with, opened to append. UsageError when another one has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{path.parent}: {what}") from None
        yield handle
    finally:
        os.close(handle)


class Journal:
    """Appends to the journal of a version, for one process at a time: what was written survives a crash, what could not is not there."""

    def __init__(self, version: Path) -> None:
        self._holding = alone(version / JOURNAL, "another service with a key writes to this index; give each its own --index")
        self._file = self._holding.__enter__()
        os.ftruncate(self._file, len(Version(version).journal_text()))
        flush_folder(version)

    def write(self, record: Record) -> None:
        """One more line, on disk when this returns. OSError where it cannot be; then nothing of it stays."""
        before = os.fstat(self._file).st_size
        text = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            while text:
                text = text[os.write(self._file, text) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, before)
            raise

    def close(self) -> None:
        """No more lines."""
        self._holding.__exit__(None, None, None)
