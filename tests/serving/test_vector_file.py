"""Test that files of vectors are read only in the format that we write, because FAISS's own reader
opens other files that they name.
"""

import io
import json
import os
import random
import shutil

import faiss
import numpy as np
import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256
from megatron_interbert.serving.index import (
    FACTS,
    VECTORS,
    Version,
    prune,
    version_names,
    write_version,
)
from megatron_interbert.serving.items import Item
from megatron_interbert.serving.journal import begin
from megatron_interbert.serving.vector_file import Foreign, read_vectors
from megatron_interbert.serving.vector_index import VectorIndex
from megatron_interbert.weights.manifest import seal

COUNT = 300
WIDTH = 8
ITEMS = [Item(f"i{n}", f"p{n}", f"title {n}") for n in range(COUNT)]


def vectors(seed=0, count=COUNT):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def written(kind, count=COUNT):
    index = VectorIndex(WIDTH, kind)
    index.add(range(count), vectors(count=count))
    return index, faiss.serialize_index(index.faiss).tobytes()


def read(data, kind):
    return VectorIndex.of(read_vectors(io.BytesIO(data), kind, len(data)), kind)


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
@pytest.mark.parametrize("count", [0, 1, COUNT])
def test_what_faiss_has_written_is_read_as_it_was(kind, count):
    """Check that it gives the same answers, that it is written again as the same bytes, and that
    new vectors can be added.
    """
    before, data = written(kind, count)
    after = read(data, kind)
    assert faiss.serialize_index(after.faiss).tobytes() == data
    asked = vectors(seed=1, count=20)
    for first, second in zip(before.search(asked, 10), after.search(asked, 10), strict=True):
        assert first.tolist() == second.tolist()

    after.add(range(count, count + 50), vectors(seed=2, count=50))
    after.remove(count + 3)
    best = after.search(vectors(seed=2, count=50), 300)
    assert count + 3 not in np.concatenate(best)
    assert count + 4 in best[4]


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_a_mutated_file_is_refused_or_can_be_searched(kind):
    """Check that no length, level or neighbour leads FAISS outside its memory."""
    draw = random.Random(0)
    refused = 0
    _, data = written(kind, 60)

    for _ in range(600):
        altered = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            at = draw.choice([draw.randrange(len(data)), draw.randrange(200)])
            altered[at] = draw.choice([0, 1, 255, draw.randrange(256)])

        if draw.random() < 0.2:
            del altered[draw.randrange(len(data)) :]
        try:
            index = read(bytes(altered), kind)
        except Foreign:
            refused += 1
            continue

        index.search(vectors(count=5), 10)
        index.add(range(60, 65), vectors(count=5))

    assert refused > 150


def version_with(folder, data):
    """Write a version whose file of vectors was replaced, and its manifest sealed to match."""
    version = Version(folder / write_version(folder, ITEMS, vectors(), "exact", {}, begin(folder)))
    (version.path / VECTORS).write_bytes(data)
    facts = dict(version.facts)
    del facts["manifest_sha256"]
    facts["sha256"][VECTORS] = file_sha256(version.path / VECTORS)
    (version.path / FACTS).write_text(json.dumps(seal(facts)))

    return Version(version.path)


def foreign(victim):
    """Return what FAISS writes for vectors in another file, which it maps for reading and
    writing.
    """
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(WIDTH), WIDTH, 1, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors())
    lists = faiss.OnDiskInvertedLists(1, index.code_size, str(victim))
    index.replace_invlists(lists, False)
    index.add_with_ids(vectors(), np.arange(COUNT))

    return faiss.serialize_index(index).tobytes()


@pytest.mark.parametrize("around", ["", "exact", "hnsw"])
def test_a_file_that_names_other_files_is_not_followed(tmp_path, around, monkeypatch):
    """Check this for such a file alone, and for one in the place of the vectors in ours."""
    data = foreign(tmp_path / "victim")

    if around:
        ours = written(around)[1]
        ids = np.arange(COUNT).tobytes()
        data = ours[: ours.index(b"IxFI")] + data + ours[-len(ids) - 8 :]

    folder = tmp_path / "index"
    folder.mkdir()
    version = version_with(folder, data)

    monkeypatch.setattr(faiss, "read_index", None)
    for kind in ("exact", "hnsw"):
        version.facts["kind"] = kind
        with pytest.raises(UsageError, match=r"vectors\.faiss: not a file of vectors that we"):
            version.vectors()

    assert not version.is_whole()


def test_vectors_that_are_not_finite_push_nothing_out(tmp_path):
    """Check that none are written, and that versions of them, such as earlier versions of this
    package wrote, do not push out sound ones.
    """
    folder = tmp_path / "index"
    folder.mkdir()
    mark = begin(folder)
    good = write_version(folder, ITEMS, vectors(), "exact", {}, mark)

    for value in (np.nan, np.inf):
        odd = vectors()
        odd[3, 1] = value
        with pytest.raises(
            UsageError, match="1 of 300 items vectors that are not finite, the first of item i3"
        ):
            write_version(folder, ITEMS, odd, "exact", {}, mark)

    assert version_names(folder) == [good]

    for _ in range(3):
        index = VectorIndex(WIDTH)
        index.add(range(COUNT), np.full((COUNT, WIDTH), np.nan))
        version = version_with(folder, faiss.serialize_index(index.faiss).tobytes())
        with pytest.raises(UsageError, match="not finite"):
            version.vectors()

    os.unlink(folder / "current")
    prune(folder, [])
    assert good in version_names(folder)


@pytest.mark.parametrize("name", [VECTORS, FACTS, "items.jsonl"])
def test_files_of_a_version_are_no_links(tmp_path, name):
    """Check this even for a link to the same content: only files in the index are read."""
    folder = tmp_path / "index"
    folder.mkdir()
    version = Version(folder / write_version(folder, ITEMS, vectors(), "exact", {}, begin(folder)))
    shutil.move(version.path / name, tmp_path / name)
    (version.path / name).symlink_to(tmp_path / name)

    def read_all():
        again = Version(version.path)
        again.items()
        again.vectors()

    with pytest.raises(UsageError, match=f"{name}: expected a plain file, found a link"):
        read_all()
