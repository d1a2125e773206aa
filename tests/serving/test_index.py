"""Vectors in FAISS against brute force; versions that are whole or not there; journals that survive crashes; wrong weights, damage."""

import json
import os
import shutil

import numpy as np
import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.serving import index as index_module
from megatron_interbert.serving.index import CURRENT, JOURNAL, VECTORS, Journal, VectorIndex, Version, prune, write_version
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
    """Whatever stands in titles: also the characters that some readers take for ends of lines."""
    odd = [*ITEMS, Item("odd", "p", "红\u2028色\u2029连\x85衣\x0b裙\r\n", {"a\u2028": "\x1c"})]
    name = write_version(tmp_path, odd, vectors(51), "exact", MODEL, {})
    version = Version.current(tmp_path)
    assert version.name == name == (tmp_path / CURRENT).resolve().name
    assert version.items() == odd
    best = version.vectors().search(vectors(1, 3), 4)[0]
    assert best.tolist() == np.argsort(-(vectors(51) @ vectors(1, 3)[0]))[:4].tolist()
    newer = write_version(tmp_path, ITEMS[:3], vectors(3), "hnsw", MODEL, {})
    assert Version.current(tmp_path).name == newer
    assert len(Version.current(tmp_path).items()) == 3


def test_a_version_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    version = write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, {})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_module, "write_text", fail)
    with pytest.raises(OSError, match="No space"):
        write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, {})
    assert Version.current(tmp_path).name == version
    assert {path.name for path in tmp_path.iterdir()} == {version, CURRENT}


def test_damage_is_named(tmp_path):
    with pytest.raises(UsageError, match="no index there"):
        Version.current(tmp_path)
    write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, {})
    file = tmp_path / CURRENT / VECTORS
    text = bytearray(file.read_bytes())
    text[-1] ^= 1
    file.write_bytes(text)
    with pytest.raises(UsageError, match=r"vectors\.faiss: sha256 differs"):
        Version.current(tmp_path).vectors()
    assert Version.current(tmp_path).items() == ITEMS, "what is whole can still be built from"


def test_only_versions_are_pruned(tmp_path):
    """An index may lie in a run's folder, and a build may be under way."""
    for name in ("global_step100", ".0123456789ab.new", "abcdefabcdef"):
        (tmp_path / name).mkdir()
    versions = []
    for number in range(5):
        versions.append(write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, {}))
        os.utime(tmp_path / versions[-1], (number, number))
    prune(tmp_path, [versions[0], versions[-1]])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("global_step100", ".0123456789ab.new", "abcdefabcdef", CURRENT),
        *(versions[0], versions[3], versions[4]),
    }


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_journal_that_was_cut_keeps_what_was_promised(tmp_path, cut):
    """A crash in the middle of a line: that change was promised to nobody, those before it and after the restart are kept."""
    write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, {})
    folder = (tmp_path / CURRENT).resolve()
    journal = Journal(folder)
    journal.write({"remove": "i3"})
    journal.write({"put": Item("new", "p1", "一件").record()})
    journal.close()
    (folder / JOURNAL).write_bytes((folder / JOURNAL).read_bytes() + json.dumps({"remove": "i4" * 10}).encode()[:cut])
    assert [list(record) for record in Version(folder).records()] == [["remove"], ["put"]]
    journal = Journal(folder)
    journal.write({"remove": "i5"})
    journal.close()
    version = Version(folder)
    assert [list(record) for record in version.records()] == [["remove"], ["put"], ["remove"]]
    items, parent = version.items_now()
    assert {item.item_id for item in items} == {item.item_id for item in ITEMS} - {"i3", "i5"} | {"new"}
    assert parent == {"version": version.name, "journal_bytes": (folder / JOURNAL).stat().st_size}


def test_what_cannot_be_written_does_not_stay(tmp_path, monkeypatch):
    """A disk that is full in the middle of a line, and one that fails when it is flushed."""
    write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, {})
    folder = (tmp_path / CURRENT).resolve()
    journal, write, fsync = Journal(folder), os.write, os.fsync
    journal.write({"remove": "i1"})
    halves = iter([lambda f, text: write(f, text[:5]), lambda *_: fail()])

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_module.os, "write", lambda *arguments: next(halves)(*arguments))
    with pytest.raises(OSError, match="No space"):
        journal.write({"remove": "i2"})
    monkeypatch.setattr(index_module.os, "write", write)
    monkeypatch.setattr(index_module.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        journal.write({"remove": "i3"})
    monkeypatch.setattr(index_module.os, "fsync", fsync)
    journal.write({"remove": "i4"})
    assert Version(folder).records() == [{"remove": "i1"}, {"remove": "i4"}]
    with pytest.raises(UsageError, match="another service with a key writes to this index"):
        Journal(folder)
    journal.close()


def put(number):
    return {"put": Item(f"n{number}", "p1", f"title {number}").record()}


def test_no_change_is_lost_whichever_version_takes_over(tmp_path):
    """Changes go to the served version while others are built of it, of each other, overlapping; and it is stopped before it takes over."""

    def build(parent):
        items, facts = parent.items_now()
        return Version(tmp_path / write_version(tmp_path, items, vectors(len(items)), "exact", MODEL, facts))

    def there(version):
        return {item.item_id for item in version.items_now()[0]}

    first = Version(tmp_path / write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, {}))
    journal = Journal(first.path)
    journal.write(put(1))
    second = build(first)
    journal.write(put(2))
    beside = build(first)  # of the same parent
    third = build(second)  # before the second was served
    journal.write({"remove": "n1"})
    journal.write(put(3))
    journal.close()
    expected = {item.item_id for item in ITEMS} | {"n2", "n3"}
    assert there(second) == there(beside) == there(third) == expected
    taken = Journal(third.path)
    taken.write({"taken": third.inherited()})
    taken.write(put(4))
    taken.close()
    assert there(third) == expected | {"n4"}
    fourth = build(third)
    assert fourth.inherited() == []
    assert there(fourth) == expected | {"n4"}
    shutil.rmtree(first.path)
    assert there(third) == expected | {"n4"}, "it has taken over what it needs"
    with pytest.raises(UsageError, match="is gone, with changes that came later"):
        second.changes()
