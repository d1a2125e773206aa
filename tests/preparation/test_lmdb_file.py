"""Test our LMDB reader: the same rows as from the library, and a one-line error for a file that was
cut or altered.
"""

import os
import random

import lmdb
import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.sources.fields import ReadOptions
from megatron_interbert.preparation.building.sources.lmdb import LmdbSource
from megatron_interbert.preparation.building.sources.lmdb_file import LmdbFile
from tests.preparation.formats import made_up_images, tensorpack_lmdb, write_lmdb

LENGTHS = (0, 1, 900, 2000, 2030, 4000, 9000)


@pytest.fixture
def whole(tmp_path):
    """Write a small LMDB with a tree of three levels and values in pages of their own."""
    chance = random.Random(0)
    rows = [(b"key-%05d" % n + 80 * b"x", bytes(chance.choice(LENGTHS))) for n in range(900)]
    return write_lmdb(tmp_path / "whole", rows)


def all_rows(path):
    with LmdbFile(str(path)) as file:
        return [(row.key, file.value(row)) for row in file.rows()]


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_those_of_the_library(tmp_path, seed):
    """Check the rows from any key on, after puts and removals in several transactions."""
    chance = random.Random(seed)

    with lmdb.open(str(tmp_path / "x"), map_size=1 << 28) as environment:
        for _ in range(chance.randrange(1, 4)):
            with environment.begin(write=True) as transaction:
                for _ in range(chance.choice((0, 5, 700))):
                    key = chance.randbytes(chance.randrange(1, 200))
                    transaction.put(key, chance.randbytes(chance.choice(LENGTHS)))

                keys = list(transaction.cursor().iternext(values=False))
                for key in chance.sample(keys, len(keys) // 3):
                    transaction.delete(key)

        with environment.begin() as view:
            expected = list(view.cursor())

    assert all_rows(tmp_path / "x") == expected
    with LmdbFile(str(tmp_path / "x" / "data.mdb")) as file:
        for key, _ in chance.sample(expected, min(10, len(expected))):
            for start in (key, key + b"x", key[:-1]):
                assert [row.key for row in file.rows(start)] == [
                    k for k, _ in expected if k >= start
                ]


def test_a_cut_file_is_one_line(whole, tmp_path):
    data = (whole / "data.mdb").read_bytes()
    with lmdb.open(str(whole)) as environment:
        assert environment.stat()["depth"] == 3
    for size in (0, 1, 100, 4096, 8192, 20_000, len(data) // 2, len(data) - 5000):
        (tmp_path / "cut.mdb").write_bytes(data[:size])
        with pytest.raises(UsageError, match=r"cut.mdb: \d+ bytes, but it refers to bytes"):
            all_rows(tmp_path / "cut.mdb")


def test_a_source_that_was_cut_is_refused_before_work_begins(tmp_path):
    images = made_up_images(30, features=512)
    path = tensorpack_lmdb(tmp_path / "x", images, ["a red cat"] * len(images)) / "data.mdb"
    os.truncate(path, path.stat().st_size * 2 // 3)
    with pytest.raises(UsageError, match="was cut or damaged"):
        LmdbSource(str(tmp_path / "x"), ReadOptions()).units(16)


def test_altered_files_end_in_one_line_or_in_rows(whole, tmp_path):
    data = (whole / "data.mdb").read_bytes()
    messages = []

    for seed in range(100):
        chance = random.Random(seed)
        altered = bytearray(data)
        for _ in range(chance.choice((1, 20, 200))):
            altered[chance.randrange(len(data))] = chance.choice((0, 255, chance.randrange(256)))
        for page in (0, 1):  # the meta pages, more often than by chance
            if seed % 3 == 0:
                altered[page * 4096 + chance.randrange(152)] ^= 1 << chance.randrange(8)

        (tmp_path / "altered.mdb").write_bytes(altered)
        try:
            all_rows(tmp_path / "altered.mdb")
        except UsageError as error:
            messages.append(str(error))

    assert 20 < len(messages) < 100
    assert not any("\n" in message for message in messages)


def test_a_tree_that_bites_its_tail_ends(whole, tmp_path):
    """Check a root with the same page as a child twice, so that keys repeat."""
    altered = bytearray((whole / "data.mdb").read_bytes())

    with LmdbFile(str(whole)) as file:
        root = file.meta.root * file.meta.page_size
        page = bytes(altered[root : root + file.meta.page_size])
        places = [int.from_bytes(page[at : at + 2], "little") for at in (16, 18)]

    altered[root + places[1] : root + places[1] + 4] = page[places[0] : places[0] + 4]
    (tmp_path / "loop.mdb").write_bytes(altered)
    with pytest.raises(UsageError, match="out of order"):
        all_rows(tmp_path / "loop.mdb")


def test_what_is_no_lmdb(tmp_path):
    (tmp_path / "text").write_text("x" * 9000)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder" / "data.mdb").mkdir(parents=True)
    for name in ("text", "pipe", "folder", "absent"):
        with pytest.raises(UsageError, match="cannot be read as LMDB"):
            LmdbFile(str(tmp_path / name))


def test_keys_in_another_order_are_refused(whole, tmp_path):
    altered = bytearray((whole / "data.mdb").read_bytes())
    for page in (0, 4096):
        altered[page + 92] = 8  # MDB_INTEGERKEY
    (tmp_path / "odd.mdb").write_bytes(altered)
    with pytest.raises(UsageError, match="a custom order"):
        LmdbFile(str(tmp_path / "odd.mdb"))
