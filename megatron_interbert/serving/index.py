"""Vectors of items in FAISS, and the folder in which an index outlives the process that made it.

    INDEX/<version>/vectors.faiss   vectors by the number of their item in items.jsonl
    INDEX/<version>/items.jsonl     the items
    INDEX/<version>/manifest.json   version, sha256 of the model's weights and of both files
    INDEX/current                   link to the version that is served
    INDEX/<version>/journal.jsonl   what was added, changed and removed since

A version is written beside and renamed, then the link is swapped: a reader sees a whole one, old or new. It belongs to the weights with
which its vectors were made; others are refused.
"""

import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from megatron_interbert.config import read_json
from megatron_interbert.data.manifest import file_sha256
from megatron_interbert.errors import UsageError
from megatron_interbert.serving.items import Item
from megatron_interbert.weights.files import flush_folder, write_json, write_text

CURRENT, VECTORS, ITEMS, FACTS, JOURNAL = "current", "vectors.faiss", "items.jsonl", "manifest.json", "journal.jsonl"
KINDS = ("exact", "hnsw")
LINKS, BREADTH = 32, 128  # of an HNSW graph; candidates that a search looks at


class VectorIndex:
    """Inner products of vectors [P] by place. `exact` compares with all, `hnsw` walks a graph: for millions of items.

    A graph cannot forget a vector: places that are gone are left out of what it finds, and a new version forgets them.
    """

    def __init__(self, width: int, kind: str = "exact") -> None:
        inner = faiss.IndexFlatIP(width) if kind == "exact" else faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
        self.kind, self.faiss = kind, faiss.IndexIDMap(inner)
        self.gone: set[int] = set()
        self._lock = threading.Lock()

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
            most = min(k + len(self.gone), self.faiss.ntotal)
            if not most:
                return [np.zeros(0, np.int64)] * len(vectors)
            if self.kind == "hnsw":
                faiss.downcast_index(self.faiss.index).hnsw.efSearch = max(BREADTH, most)
            _, found = self.faiss.search(np.ascontiguousarray(vectors, np.float32), most)
            gone = np.array(sorted(self.gone), np.int64)
        rows = [row[row >= 0] for row in found]
        return [row[~np.isin(row, gone)][:k] for row in rows]


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
        write_text(beside / ITEMS, "".join(json.dumps(item.record(), ensure_ascii=False) + "\n" for item in items))
        hashes = {name: file_sha256(beside / name) for name in (VECTORS, ITEMS)}
        write_json(
            beside / FACTS,
            {"version": version, "kind": kind, "model": model, "parent": parent, "items": len(items), "sha256": hashes},
        )
        flush_folder(beside)
        beside.rename(folder / version)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    link = folder / f".{version}.link"
    link.symlink_to(version)
    os.replace(link, folder / CURRENT)
    flush_folder(folder)
    return version


class Stored:
    """The current version of a folder, checked; its items with what the journal says, and who may write to the journal."""

    def __init__(self, folder: Path, model: dict[str, Any] | None) -> None:
        """UsageError where there is none, where a file is damaged, or where it was made with another `model` (None: whichever)."""
        if not (folder / CURRENT).is_dir():
            raise UsageError(f"{folder}: no index there; make one with python -m megatron_interbert.serve --build-only")
        self.path = (folder / CURRENT).resolve()
        facts = read_json(self.path / FACTS, "--index")
        for name, expected in facts["sha256"].items():
            if file_sha256(self.path / name) != expected:
                raise UsageError(f"{self.path / name}: sha256 differs from {FACTS} (corrupt); build the index again")
        if model not in (None, facts["model"]):
            raise UsageError(f"{folder}: the index was made with other weights or settings than these; build it again (--rebuild)")
        self.version, self.kind, self.parent = facts["version"], facts["kind"], facts["parent"]
        self.index = VectorIndex(1, "exact")
        self.index.faiss, self.index.kind = faiss.read_index(str(self.path / VECTORS)), self.kind
        lines = (self.path / ITEMS).read_text(encoding="utf-8").splitlines()
        self.items = [Item(**json.loads(line)) for line in lines]

    def journal(self) -> Iterator[dict[str, Any]]:
        """What happened since, in order."""
        return self.records(self.journal_text())

    def journal_text(self) -> bytes:
        """The journal as it is now."""
        path = self.path / JOURNAL
        return path.read_bytes() if path.exists() else b""

    @staticmethod
    def records(text: bytes) -> Iterator[dict[str, Any]]:
        """Changes in order. A last line that was cut by a crash is none: nobody was told that it had happened."""
        for line in text.split(b"\n")[:-1]:
            yield json.loads(line)

    def items_now(self) -> tuple[list[Item], dict[str, Any]]:
        """The items with what the journal says, and what a version made of them must say of its parent."""
        text = self.journal_text()
        items = {item.item_id: item for item in self.items}
        for record in self.records(text):
            if "remove" in record:
                items.pop(record["remove"], None)
            else:
                items.update({values["item_id"]: Item(**values) for values in record["put"]})
        return list(items.values()), {"version": self.version, "journal_bytes": text.rfind(b"\n") + 1}


class Journal:
    """Appends to the journal of a version; what has been written survives a crash."""

    def __init__(self, version: Path) -> None:
        self._file = open(version / JOURNAL, "ab")
        whole = self._file.tell()
        text = (version / JOURNAL).read_bytes()
        kept = text.rfind(b"\n") + 1
        if kept < whole:
            self._file.truncate(kept)
            self._file.seek(kept)

    def write(self, record: dict[str, Any]) -> None:
        """One more line, on disk when this returns."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more lines."""
        self._file.close()
