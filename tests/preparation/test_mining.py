"""Test mined hard negatives against the TF-IDF in float64 below, by brute force, on random, English
and Chinese captions.
"""

import itertools
import json
import math
import os
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch

from megatron_interbert.data.manifest import HARD_NEGATIVES
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.mining import neighbours
from megatron_interbert.preparation.mining.index import build_index
from megatron_interbert.preparation.mining.search import MiningOptions, Searcher, mine
from megatron_interbert.preparation.mining.terms import normalise, terms_of
from megatron_interbert.preparation.mining.work import (
    MiningFolder,
    TableFolder,
    finish_together,
    work_on,
)
from megatron_interbert.preparation.sharing import Team
from tests.corpus import write_store
from tests.shared import SHARED, needs_shared

CLOSE = 1e-6  # similarities nearer than this count as equal
CAPTIONS = SHARED / "data" / "captions"


def slow_terms(text, ngrams=(1, 2)):
    """Split a text into terms character by character: a term ends where letters end or the script
    changes.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    kinds = [
        (
            "cjk"
            if "\u3041" <= c <= "\u9fff" or "\uac00" <= c <= "\ud7a3"
            else "word"
            if c.isalnum()
            else ""
        )
        for c in text
    ]
    terms = []

    for kind, group in itertools.groupby(zip(kinds, text, strict=True), key=lambda pair: pair[0]):
        run = "".join(character for _, character in group)
        if kind == "word":
            terms.append(run)
        elif kind == "cjk":
            terms += [run[i : i + n] for n in ngrams for i in range(len(run)) if i + n <= len(run)]

    return terms


def brute_force(captions, queries):
    """Return the similarity of each query to each caption, float64 [Q, N]."""
    counted = [Counter(slow_terms(caption)) for caption in captions]
    frequency = Counter(term for row in counted for term in row)
    column = {term: i for i, term in enumerate(frequency)}
    holders = np.repeat(np.arange(len(captions)), [len(row) for row in counted])
    columns = np.array([column[term] for row in counted for term in row])
    weights = np.array(
        [
            count * (math.log((1 + len(captions)) / (1 + frequency[term])) + 1)
            for row in counted
            for term, count in row.items()
        ]
    )
    weights /= np.sqrt(np.bincount(holders, weights**2, len(captions)))[holders]
    similarity = np.empty((len(queries), len(captions)))

    for row, query in enumerate(queries):
        dense = np.zeros(len(column))
        dense[columns[holders == query]] = weights[holders == query]
        similarity[row] = np.bincount(holders, weights * dense[columns], len(captions))

    return similarity


def check(captions, images, found, scores, top=30, below=0.5, queries=None):
    """Check that the row of each query (default: all) holds only allowed captions, in order, and
    the most similar of these except among equal similarities.
    """
    queries = np.arange(len(captions)) if queries is None else queries
    similarity = brute_force(captions, queries)
    same = [unicodedata.normalize("NFKC", c).lower().strip() for c in captions]
    codes = np.unique(same, return_inverse=True)[1]

    for row, query in enumerate(queries):
        mine = found[row][found[row] >= 0]
        assert len(set(mine.tolist())) == len(mine)
        allowed = (
            (similarity[row] < below - CLOSE)
            & (images != images[query])
            & (codes != codes[query])
            & (similarity[row] > 1e-9)
        )
        border = np.zeros(len(captions), dtype=bool)
        border[mine] = np.abs(similarity[row, mine] - below) < CLOSE
        assert (allowed | border)[mine].all(), (captions[query], [captions[i] for i in mine])
        wanted = np.sort(similarity[row, allowed | border])[::-1][:top]
        np.testing.assert_allclose(similarity[row, mine], wanted, atol=CLOSE)
        np.testing.assert_allclose(scores[row, : len(mine)], similarity[row, mine], atol=CLOSE)
        assert (found[row, len(mine) :] == -1).all()
        if len(wanted) == top:
            surely = set(np.flatnonzero(allowed & (similarity[row] > wanted[-1] + CLOSE)))
            assert surely <= set(mine.tolist())


def search(captions, images, threads=1, **options):
    searcher = Searcher(build_index(captions, images), MiningOptions(**options), threads)
    return searcher.search(np.arange(len(captions)))


def random_captions(number, seed=0):
    """Make captions from few words of very different frequency, with repeated words, empty and
    repeated captions, and captions of the same words.
    """
    random = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(60)]
    chance = 1 / np.arange(1, 61)
    rows = [
        " ".join(random.choice(words, size=random.integers(0, 10), p=chance / chance.sum()))
        for _ in range(number)
    ]

    return (
        rows
        + rows[: number // 10]
        + [" ".join(reversed(row.split())) for row in rows[: number // 10]]
    )


def chinese_like(number, seed=0):
    """Make captions of few characters, some with an English word."""
    random = np.random.default_rng(seed)
    return [
        "".join(random.choice(list("红色的猫在树上看狗"), size=random.integers(1, 9)))
        + random.choice(["", " w1", " w40"])
        for _ in range(number)
    ]


def coco():
    records = json.loads((CAPTIONS / "coco_val2017.json").read_text())["annotations"]
    return [r["caption"] for r in records], np.array([r["image_id"] for r in records])


def chinese():
    pairs = [
        line.split(maxsplit=1)
        for line in (CAPTIONS / "flickr8k_zh.txt").read_text().splitlines()
        if line.strip()
    ]
    names = [pair[0].split("#")[0] for pair in pairs]
    return [pair[1] if len(pair) > 1 else "" for pair in pairs], np.unique(
        names, return_inverse=True
    )[1]


def test_terms():
    assert terms_of(normalise("Two CATS, don't_touch 3!")) == [
        "two",
        "cats",
        "don",
        "t",
        "touch",
        "3",
    ]
    assert terms_of(normalise("红色杯子")) == ["红", "色", "杯", "子", "红色", "色杯", "杯子"]
    assert terms_of(normalise("A红猫b")) == ["a", "红", "猫", "红猫", "b"]
    assert terms_of(normalise("Ｃafé 猫"), (2, 3)) == [
        "café",
        "猫",
    ], "a run too short for any n-gram is itself a term"
    assert terms_of(normalise(" \n…")) == []
    for text in ("Ein Hünd läuft", "猫と犬がいる", "고양이 two", "a\u3000b", "x²"):
        assert sorted(terms_of(normalise(text))) == sorted(slow_terms(text))


@pytest.mark.parametrize(("top", "below"), [(30, 0.5), (5, 0.3), (200, 1.0)])
def test_what_is_found_is_what_brute_force_finds(top, below):
    short = random_captions(500)
    long = [" ".join(random_captions(9, seed)) for seed in range(100)]
    captions = short + long + chinese_like(200)
    images = np.random.default_rng(1).integers(150, size=len(captions))
    found, scores = search(captions, images, top=top, max_similarity=below)
    check(captions, images, found, scores, top, below)
    empty = [i for i, caption in enumerate(captions) if not caption]
    assert len(empty) > 10
    assert (found[empty] == -1).all()
    assert (search(["", " ...", "?"], np.arange(3))[0] == -1).all()


def test_the_same_image_and_the_same_text_are_never_negatives():
    captions = ["a red cat", "A red cat ", "a red dog", "a red dog sits", "red red tree"] * 4
    images = np.repeat(np.arange(4), 5)
    found, _ = search(captions, images, max_similarity=1.0)
    keys = [caption.strip().lower() for caption in captions]

    for row, others in enumerate(found):
        others = others[others >= 0]
        assert len(others)
        assert all(images[o] != images[row] and keys[o] != keys[row] for o in others)


def test_equal_similarities_are_kept_by_number():
    captions = [f"cat n{i}" for i in range(3000)]
    images = np.arange(len(captions)) // 2
    found, scores = search(captions, images)
    assert len(np.unique(scores)) == 1

    for row, others in enumerate(found):
        wanted = [i for i in range(33) if images[i] != images[row]][:30]
        assert others.tolist() == wanted


def test_copies_of_a_text_are_all_negatives():
    captions = ["red cat on a tree", "red dog in a wood"] * 400 + [f"w{i}" for i in range(99)]
    images = np.arange(len(captions)) % 100
    found, _ = search(captions, images)
    for row in range(800):
        wanted = [i for i in range(800) if i % 2 != row % 2 and images[i] != images[row]][:30]
        assert found[row].tolist() == wanted


def test_long_lists_are_read_to_the_right_place():
    """Lists of thousands of entries, of which most are never read."""
    random = np.random.default_rng(3)
    captions = random_captions(12_000, seed=2)
    captions = [f"{caption} n{random.zipf(1.3) % 4000}" for caption in captions]
    images = np.arange(len(captions)) // 5
    queries = random.permutation(len(captions))[:300]

    for top, below in ((30, 0.5), (3, 0.2)):
        searcher = Searcher(build_index(captions, images), MiningOptions(top, below))
        check(captions, images, *searcher.search(queries), top, below, queries)


def test_threads_change_nothing():
    captions = random_captions(1500)
    images = np.arange(len(captions)) // 3
    found, scores = search(captions, images)

    for threads in (2, 5):
        again, same = search(captions, images, threads=threads)
        np.testing.assert_array_equal(again, found)
        np.testing.assert_array_equal(same, scores)


@needs_shared
@pytest.mark.parametrize("read", [coco, chinese])
def test_real_captions(read):
    captions, images = read()
    assert len(captions) > 25_000
    queries = np.random.default_rng(0).permutation(len(captions))[:300]
    searcher = Searcher(build_index(captions, images), MiningOptions(), threads=2)
    check(captions, images, *searcher.search(queries), queries=queries)


class Killed(BaseException):
    """Represent the death of the process, which nothing catches."""


def kill_at(monkeypatch, number, after):
    """End the process before or `after` the file-system change (rename, removal, new folder) with
    this number.
    """
    calls = itertools.count()

    def wrap(function):
        def change(*args, **kwargs):
            last = next(calls) == number
            if last and not after:
                raise Killed
            function(*args, **kwargs)
            if last:
                raise Killed

        return change

    for name in ("replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))


def test_killed_anywhere_it_goes_on_to_the_same_table(tmp_path, monkeypatch):
    store = RegionStore(str(write_store(tmp_path / "store", images=40)))
    options = MiningOptions(block=17)
    output = store.path / HARD_NEGATIVES
    summary = mine(store, options)
    whole = output.read_bytes()
    np.testing.assert_array_equal(np.load(output), store.hard_negatives())
    kills = 0

    for number, after in itertools.product(range(1000), (False, True)):
        output.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            kill_at(patch, number, after)
            try:
                mine(store, options)
            except Killed:
                kills += 1
            else:
                break

        if (
            output.exists()
            and not (store.path / f"{HARD_NEGATIVES}.partial" / "done.json").exists()
        ):
            with pytest.raises(UsageError, match="already exists"):  # killed when all was done
                mine(store, options)
        else:
            assert mine(store, options) == summary

        assert output.read_bytes() == whole

    assert kills > 30


def test_blocks_and_broken_block_files_change_nothing(tmp_path):
    store = RegionStore(str(write_store(tmp_path / "store", images=60)))
    mine(store, MiningOptions())
    whole = (store.path / HARD_NEGATIVES).read_bytes()
    for block in (1, 50, 120):
        mine(store, MiningOptions(block=block), threads=2, overwrite=True)
        assert (store.path / HARD_NEGATIVES).read_bytes() == whole

    with MiningFolder(store, {**vars(MiningOptions(block=50))}) as folder:
        folder.open(restart=False)
        folder.write_block(0, np.zeros((50, 7), dtype=np.int32))
        (folder.path / "block-000001.npy").write_bytes(b"half of a")
        with pytest.raises(UsageError, match="another command is mining"):
            mine(store, MiningOptions(block=50), overwrite=True)

    mine(store, MiningOptions(block=50), overwrite=True)
    assert (store.path / HARD_NEGATIVES).read_bytes() == whole


def test_a_process_that_comes_late_leaves_what_the_others_have_made(tmp_path):
    """Check both ranks of a team in turn, with --overwrite too, and a table that is older than the
    team.
    """
    rows = np.ones((4, 2), np.int32)
    (tmp_path / "manifest.json").write_text("{}")

    def work(rank, overwrite=False):
        folder = TableFolder(tmp_path / HARD_NEGATIVES, {"x": 1}, 4, 2, 2, 4)

        def finish(may_publish):
            folder.assemble()
            assert may_publish()
            folder.publish({"rank": rank})
            return {"rank": rank}

        def make(claims):
            folder.complete(lambda numbers: rows[: len(numbers)], claims)
            return finish_together(folder, finish, claims)

        return work_on(folder, Team(rank, 2), False, overwrite, make)

    assert work(1) == {"rank": 1}
    table = tmp_path / HARD_NEGATIVES
    made = table.stat().st_mtime_ns
    assert work(0) is None
    assert work(0, overwrite=True) is None
    assert table.stat().st_mtime_ns == made

    os.utime(table, (0, 0))
    with pytest.raises(UsageError, match="already exists; give --overwrite"):
        work(0)
    assert work(0, overwrite=True) == {"rank": 0}


@pytest.mark.parametrize("tile", [1, 3, 7, 100])
def test_neighbours_do_not_depend_on_tiles(monkeypatch, tile):
    monkeypatch.setattr(neighbours, "IMAGES_OF_TILE", tile)
    means = torch.randn(23, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    squares = means.square().sum(dim=1)
    distance = torch.cdist(means, means).fill_diagonal_(torch.inf)
    expected = distance.argsort(dim=1)[:, :4].numpy()
    for rows in (range(0, 23), range(5, 9)):
        found = neighbours.nearest_images(means, squares, rows, 4)
        np.testing.assert_array_equal(found, expected[rows.start : rows.stop])
