"""Vectors of items in FAISS, and the folder in which an index outlives the process that made it.

    INDEX/<version>/vectors.faiss   vectors by the number of their item in items.jsonl
    INDEX/<version>/items.jsonl     the items
    INDEX/<version>/manifest.json   the version, where the journal stood when the items were read, sha256 of weights and of both files
    INDEX/current                   link to the version that is served
    INDEX/journal.jsonl             what was added, changed and removed, in order (journal.py)

A version is written beside, flushed and renamed, then the link is swapped: a reader sees a whole one, old or new. It belongs to the weights
with which its vectors were made; others are refused. Its items are those of items.jsonl with all that the journal holds from its place on,
so whichever version is served, no change is lost.
"""

import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from megatron_interbert.config import read_json
from megatron_interbert.data.manifest import file_sha256
from megatron_interbert.errors import UsageError
from megatron_interbert.serving.items import Item
from megatron_interbert.serving.journal import collapsed, read_journal
from megatron_interbert.weights.files import flush_file, flush_folder, write_json, write_text

CURRENT, VECTORS, ITEMS, FACTS = "current", "vectors.faiss", "items.jsonl", "manifest.json"
NAME = re.compile(r"[0-9a-f]{12}")
LINKS, BREADTH = 32, 128  # of an HNSW graph; candidates that a search looks at


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
        if "journal" not in self.facts:
            raise UsageError(
                f"{path}: made by an earlier version of this package; remove {path.parent} and begin anew (--items FILE)"
            )
        self.place: int = self.facts["journal"]  # from which on the journal's changes are to be made

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

    def items_now(self) -> tuple[list[Item], int]:
        """The items with all changes, and the journal's place behind them."""
        records, place = read_journal(self.path.parent, self.place)
        items = {item.item_id: item for item in self.items()}
        for item_id, item in collapsed(records).items():
            if item is None:
                items.pop(item_id, None)
            else:
                items[item_id] = item
        return list(items.values()), place


def write_version(folder: Path, items: Sequence[Item], vectors: np.ndarray, kind: str, model: dict[str, Any], place: int) -> str:
    """Write items, as they are before the journal's `place`, and their vectors [n, P] as a new version and make it the current one; its
    name."""
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
        facts = {"version": version, "kind": kind, "model": model, "journal": place, "items": len(items), "sha256": hashes}
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


def versions_in(folder: Path) -> list[Version]:
    """All whole versions, oldest first; whatever else lies in the folder is somebody else's."""
    names = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and (path / FACTS).is_file() and not path.is_symlink()]
    return [Version(path) for path in sorted(names, key=lambda path: path.stat().st_mtime)]


def prune(folder: Path, kept: Sequence[str], newest: int = 2) -> None:
    """Remove versions but the newest few and those that are `kept`; by the process that builds, so that two never do it at once."""
    for version in versions_in(folder)[:-newest]:
        if version.name not in kept:
            shutil.rmtree(version.path, ignore_errors=True)
