"""Test FAISS searches against brute force, versions that are whole or absent, journals that survive
crashes, other weights and damage.
"""

import json
import os
import shutil

import numpy as np
import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.serving import index as index_module
from megatron_interbert.serving.index import (
    CURRENT,
    VECTORS,
    Version,
    prune,
    served_version,
    write_version,
)
from megatron_interbert.serving.items import Item
from megatron_interbert.serving.journal import JOURNAL, Journal, Mark, NotKept, begin, read_journal
from megatron_interbert.serving.vector_index import VectorIndex

MODEL = {"weights": {"a": "b"}}
NO_CHANGE = Mark("a", 0, "b")
ITEMS = [Item(f"i{n}", f"p{n}", f"title {n}", {"price": str(n)}) for n in range(50)]


def first_version(folder):
    """Begin a journal and write a version of all ITEMS; return (place in the journal, name)."""
    mark = begin(folder)
    return mark, write_version(folder, ITEMS, vectors(), "exact", MODEL, mark)


def writer(folder):
    journal = Journal(folder)
    journal.open()
    return journal


def vectors(count=50, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_the_nearest_are_found_whatever_comes_and_goes(kind):
    index = VectorIndex(16, kind)
    stored = vectors(400)
    asked = vectors(5, 1)
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
    assert min(everything) >= (len(there) if kind == "exact" else 0.95 * len(there)), (
        "some vectors of a graph may be out of reach"
    )
    assert max(everything) <= len(there)
    assert [len(found) for found in VectorIndex(16, kind).search(asked, 3)] == [0] * 5


def test_a_version_comes_back_as_it_was_written(tmp_path):
    """Check titles with characters that some readers take for line ends, too."""
    odd = [*ITEMS, Item("odd", "p", "红\u2028色\u2029连\x85衣\x0b裙\r\n", {"a\u2028": "\x1c"})]
    name = write_version(tmp_path, odd, vectors(51), "exact", MODEL, NO_CHANGE)
    version = served_version(tmp_path)
    assert version.name == name == (tmp_path / CURRENT).resolve().name
    assert version.items() == odd
    best = version.vectors().search(vectors(1, 3), 4)[0]
    assert best.tolist() == np.argsort(-(vectors(51) @ vectors(1, 3)[0]))[:4].tolist()
    newer = write_version(tmp_path, ITEMS[:3], vectors(3), "hnsw", MODEL, NO_CHANGE)
    assert served_version(tmp_path).name == newer
    assert len(served_version(tmp_path).items()) == 3


def test_a_version_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    version = write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, NO_CHANGE)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_module, "write_text", fail)
    with pytest.raises(OSError, match="No space"):
        write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, NO_CHANGE)

    assert served_version(tmp_path).name == version
    assert {path.name for path in tmp_path.iterdir()} == {version, CURRENT}


def test_damage_is_named(tmp_path):
    assert served_version(tmp_path) is None
    write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, NO_CHANGE)
    file = tmp_path / CURRENT / VECTORS
    text = bytearray(file.read_bytes())
    text[-1] ^= 1
    file.write_bytes(text)
    with pytest.raises(UsageError, match=r"vectors\.faiss: sha256 differs"):
        served_version(tmp_path).vectors()

    assert served_version(tmp_path).items() == ITEMS, "what is sound can still be built from"


def test_only_versions_are_pruned(tmp_path):
    """Check this because an index may be in a run's folder, and a build may be under way."""
    for name in ("global_step100", ".0123456789ab.new", "abcdefabcdef"):
        (tmp_path / name).mkdir()

    versions = []
    for number in range(5):
        versions.append(write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, NO_CHANGE))
        os.utime(tmp_path / versions[-1], (number, number))

    prune(tmp_path, [versions[0], versions[-1]])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("global_step100", ".0123456789ab.new", "abcdefabcdef", CURRENT),
        *(versions[0], versions[3], versions[4]),
    }


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_journal_that_was_cut_keeps_what_was_promised(tmp_path, cut):
    """Check a crash in the middle of a line: that change was never confirmed; those before it and
    after the restart are kept.
    """
    mark, _ = first_version(tmp_path)
    journal = writer(tmp_path)
    journal.write({"remove": "i3"})
    journal.write({"put": Item("new", "p1", "一\u2028件").record()})
    journal.close()
    file = tmp_path / JOURNAL
    file.write_bytes(file.read_bytes() + json.dumps({"remove": "i4" * 10}).encode()[:cut])
    assert kinds(tmp_path, mark) == ["remove", "put"]
    journal = writer(tmp_path)
    journal.write({"remove": "i5"})
    journal.close()
    assert kinds(tmp_path, mark) == ["remove", "put", "remove"]
    items, behind = served_version(tmp_path).items_now()
    assert {item.item_id for item in items} == {item.item_id for item in ITEMS} - {"i3", "i5"} | {
        "new"
    }
    assert next(item.title for item in items if item.item_id == "new") == "一\u2028件"
    assert behind.place == 3


def kinds(folder, mark):
    return [next(iter(record)) for record in read_journal(folder, mark)[0]]


def test_what_cannot_be_written_does_not_stay(tmp_path, monkeypatch):
    """Check a disk that fills up in the middle of a line, and one that fails to flush."""
    mark, _ = first_version(tmp_path)
    journal = writer(tmp_path)
    write = os.write
    fsync = os.fsync
    journal.write({"remove": "i1"})
    halves = iter([lambda f, text: write(f, text[:5]), lambda *_: fail()])

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", lambda *arguments: next(halves)(*arguments))
    with pytest.raises(NotKept, match="No space"):
        journal.write({"remove": "i2"})

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(NotKept, match="No space"):
        journal.write({"remove": "i3"})

    monkeypatch.setattr(os, "fsync", fsync)
    journal.write({"remove": "i4"})
    assert read_journal(tmp_path, mark)[0] == [{"remove": "i1"}, {"remove": "i4"}]
    journal.close()


def test_one_process_writes(tmp_path):
    """Check that a second writer is refused even before anything was written."""
    journal = Journal(tmp_path)
    first_version(tmp_path)
    with pytest.raises(UsageError, match="another service with a key writes to this index"):
        Journal(tmp_path)

    journal.close()
    Journal(tmp_path).close()


def put(number):
    return {"put": Item(f"n{number}", "p1", f"title {number}").record()}


def test_no_change_is_lost_whichever_version_is_served(tmp_path):
    """Check this with changes made while versions are built from one another, overlapping, with
    older ones removed and the journal trimmed.
    """

    def build(version):
        items, mark = version.items_now()
        return Version(
            tmp_path / write_version(tmp_path, items, vectors(len(items)), "exact", MODEL, mark)
        )

    def there(version):
        return {item.item_id for item in version.items_now()[0]}

    first = Version(tmp_path / first_version(tmp_path)[1])
    journal = writer(tmp_path)
    journal.write(put(1))
    second = build(first)
    journal.write(put(2))
    beside = build(first)
    third = build(second)  # before the second was served
    journal.write({"remove": "n1"})
    journal.write(put(3))
    expected = {item.item_id for item in ITEMS} | {"n2", "n3"}
    assert there(first) == there(second) == there(beside) == there(third) == expected
    shutil.rmtree(first.path)
    shutil.rmtree(second.path)
    size = (tmp_path / JOURNAL).stat().st_size
    journal.trim(min(beside.mark.place, third.mark.place))
    assert (tmp_path / JOURNAL).stat().st_size < size
    journal.write(put(4))
    journal.trim(0)  # less than was already trimmed: nothing to do
    journal.close()
    journal = writer(tmp_path)
    journal.write(put(5))
    expected |= {"n4", "n5"}
    assert there(beside) == there(third) == expected

    with pytest.raises(
        UsageError,
        match=r"holds changes \d+ to \d+, but the index continues from 0; restore the file",
    ):
        first.items_now()

    everything = build(third)
    journal.trim(everything.mark.place)
    assert read_journal(tmp_path, everything.mark) == ([], everything.mark)
    journal.write(put(6))
    journal.close()
    assert there(everything) == expected | {"n6"}
    kept = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).unlink()  # a version copied without its journal: changes may be missing
    with pytest.raises(UsageError, match=r"journal\.jsonl: missing, and with it the changes"):
        there(everything)

    (tmp_path / JOURNAL).write_bytes(kept)
    assert there(everything) == expected | {"n6"}


def test_a_damaged_line_is_named(tmp_path):
    version = Version(tmp_path / first_version(tmp_path)[1])
    with open(tmp_path / JOURNAL, "a") as file:
        file.write('{"put": {"item_id": "half\n')
    with pytest.raises(
        UsageError,
        match=r"journal\.jsonl: line 2 is not as it was written .*half; restore the file",
    ):
        version.items_now()


def test_an_index_of_an_earlier_package_is_named(tmp_path):
    version = tmp_path / write_version(tmp_path, ITEMS, vectors(), "exact", MODEL, NO_CHANGE)
    facts = json.loads((version / "manifest.json").read_text())
    del facts["journal"]
    (version / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match="made by an earlier version of this package; remove"):
        served_version(tmp_path)
