"""Vectors in FAISS against brute force; versions that are whole or not there; journals that survive crashes; wrong weights, damage."""

import json

import numpy as np
import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.serving import index as index_module
from megatron_interbert.serving.index import CURRENT, JOURNAL, VECTORS, Journal, Stored, VectorIndex, write_version
from megatron_interbert.serving.items import Item

MODEL = {"weights": {"a": "b"}}
ITEMS = [Item(f"i{n}", f"p{n}", f"title {n}", {"price": str(n)}) for n in range(50)]


def vectors(count=50, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_the_nearest_are_found_whatever_comes_and_goes(kind):
    index, stored, asked = VectorIndex(16, kind), vectors(400), vectors(5, 1)
    index.add(range(300), stored[:300])
    for place in range(0, 100, 3):
        index.remove(place)
    index.add(range(300, 400), stored[300:])
    there = [place for place in range(400) if place >= 100 or place % 3]
    assert len(index) == len(there)
    for row, found in zip(asked, index.search(asked, 10), strict=True):
        best = sorted(there, key=lambda place: -float(stored[place] @ row))[:10]
        assert len(set(best) & set(found.tolist())) >= (10 if kind == "exact" else 9)
        assert set(found.tolist()) <= set(there)
    everything = [len(found) for found in index.search(asked, 1000)]
    assert min(everything) >= (len(there) if kind == "exact" else 0.95 * len(there)), "a graph may not lead everywhere"
    assert max(everything) <= len(there)
    assert [len(found) for found in VectorIndex(16, kind).search(asked, 3)] == [0] * 5


def test_a_version_comes_back_as_it_was_written(tmp_path):
    version = write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, {})
    stored = Stored(tmp_path, MODEL)
    assert stored.version == version == (tmp_path / CURRENT).resolve().name
    assert stored.items == ITEMS
    best = stored.index.search(vectors(1, 3), 4)[0]
    assert best.tolist() == np.argsort(-(vectors() @ vectors(1, 3)[0]))[:4].tolist()
    newer = write_version(tmp_path, ITEMS[:3], vectors(3), "hnsw", MODEL, {})
    assert Stored(tmp_path, MODEL).version == newer
    assert len(Stored(tmp_path, MODEL).items) == 3


def test_a_version_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    version = write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, {})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_module, "write_text", fail)
    with pytest.raises(OSError, match="No space"):
        write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, {})
    assert Stored(tmp_path, MODEL).version == version
    assert {path.name for path in tmp_path.iterdir()} == {version, CURRENT}


def test_other_weights_and_damage_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no index there"):
        Stored(tmp_path, MODEL)
    write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, {})
    with pytest.raises(UsageError, match="made with other weights"):
        Stored(tmp_path, {"weights": {"a": "c"}})
    file = tmp_path / CURRENT / VECTORS
    text = bytearray(file.read_bytes())
    text[-1] ^= 1
    file.write_bytes(text)
    with pytest.raises(UsageError, match=r"vectors\.faiss: sha256 differs"):
        Stored(tmp_path, MODEL)


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_journal_that_was_cut_keeps_what_was_promised(tmp_path, cut):
    """A crash in the middle of a line: that change was promised to nobody, those before it and after the restart are kept."""
    write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, {})
    folder = (tmp_path / CURRENT).resolve()
    journal = Journal(folder)
    journal.write({"remove": "i3"})
    journal.write({"put": [Item("new", "p1", "一件").record()]})
    journal.close()
    (folder / JOURNAL).write_bytes((folder / JOURNAL).read_bytes() + json.dumps({"remove": "i4" * 10}).encode()[:cut])
    assert [list(record) for record in Stored(tmp_path, MODEL).journal()] == [["remove"], ["put"]]
    journal = Journal(folder)
    journal.write({"remove": "i5"})
    journal.close()
    stored = Stored(tmp_path, MODEL)
    assert [list(record) for record in stored.journal()] == [["remove"], ["put"], ["remove"]]
    items, parent = stored.items_now()
    assert {item.item_id for item in items} == {item.item_id for item in ITEMS} - {"i3", "i5"} | {"new"}
    assert parent == {"version": stored.version, "journal_bytes": (folder / JOURNAL).stat().st_size}
