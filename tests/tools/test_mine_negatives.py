"""Test the command as users run it: killed and repeated, wrong flags, what it prints."""

import os
import random
import shutil
import sys
import time

import numpy as np
import pytest

from megatron_interbert.data.manifest import HARD_NEGATIVES
from megatron_interbert.data.store import RegionStore
from tests.corpus import write_store
from tests.launching import kill_session, launch, start

COMMAND = (sys.executable, "tools/mine_negatives.py")
MANY_BLOCKS = ("--block", 10, "--threads", 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("mining") / "store", images=300, captions_each=3)


@pytest.fixture
def copy(store, tmp_path):
    return shutil.copytree(
        store, tmp_path / "store", ignore=shutil.ignore_patterns(f"{HARD_NEGATIVES}*")
    )


def refused(*flags):
    code, out, err = launch(*COMMAND, *flags)
    assert code == 2, out + err
    assert len(err.strip().splitlines()) == 1, err
    return err


def test_what_it_writes_and_prints(store):
    code, out, err = launch(*COMMAND, store, "--show", 2)
    assert code == 0, out + err
    assert "900 captions, 30.0 negatives each, 0 with none; mean similarity 0.4" in out
    assert sum(line.startswith("    0.") for line in out.splitlines()) == 6
    opened = RegionStore(str(store))
    table = opened.hard_negatives()
    assert table.shape == (900, 30)
    assert table.dtype == np.int32
    assert (opened.caption_image[table] != opened.caption_image[:, None])[table >= 0].all()
    assert not list(store.glob("*.partial"))

    before = (store / HARD_NEGATIVES).read_bytes()
    assert "already exists; give --overwrite" in refused(store)
    code, out, err = launch(*COMMAND, store, "--block", 100, "--threads", 1, "--overwrite")
    assert code == 0, out + err
    assert (store / HARD_NEGATIVES).read_bytes() == before


def test_killed_at_random_it_ends_in_the_same_bytes(copy):
    code, out, err = launch(*COMMAND, copy, *MANY_BLOCKS)
    assert code == 0, out + err
    output = copy / HARD_NEGATIVES
    partial = copy / f"{HARD_NEGATIVES}.partial"
    whole = output.read_bytes()
    output.unlink()
    chance = random.Random(0)
    went_on = 0

    for wanted in (1, 20, 40, 60, 80, 90):
        process = start(*COMMAND, copy, *MANY_BLOCKS)
        while process.poll() is None and len(list(partial.glob("block-*.npy"))) < wanted:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        kill_session(process)
        went_on += partial.exists()

    assert went_on >= 3
    if not output.exists() or partial.exists():
        code, out, err = launch(*COMMAND, copy, *MANY_BLOCKS)
        assert code == 0, out + err

    assert output.read_bytes() == whole
    assert not partial.exists()


def test_other_options_on_unfinished_work(copy):
    process = start(*COMMAND, copy, *MANY_BLOCKS)
    partial = copy / f"{HARD_NEGATIVES}.partial"
    while process.poll() is None and not list(partial.glob("block-*.npy")):
        time.sleep(0.001)

    kill_session(process)
    assert partial.exists()
    error = refused(copy, *MANY_BLOCKS, "--ngrams", "2", "--top", 5)
    assert "unfinished work with top 30, ngrams [1, 2], now top 5, ngrams [2]" in error
    assert "--restart" in error
    code, out, err = launch(*COMMAND, copy, *MANY_BLOCKS, "--top", 5, "--restart")
    assert code == 0, out + err
    assert np.load(copy / HARD_NEGATIVES).shape == (900, 5)


def test_wrong_use_is_one_line(copy, tmp_path):
    assert "no manifest.json there" in refused(tmp_path / "nothing")
    for flags, text in (
        (("--top", 0), "--top 0: expected a number above 0"),
        (("--block", -1), "--block -1: expected"),
        (("--max-similarity", 1.5), "--max-similarity 1.5: expected above 0, up to 1"),
        (("--max-similarity", "nan"), "--max-similarity nan: expected a finite number"),
        (("--ngrams", "0,2"), "--ngrams 0,2: expected lengths from 1 to 8"),
        (("--ngrams", "two"), "--ngrams two: expected lengths from 1 to 8"),
        (("--threads", 0), "--threads is 0, expected 1 or more"),
        (("--show", -1), "--show is -1, expected"),
    ):
        assert text in refused(copy, *flags), flags

    assert sorted(p.name for p in copy.iterdir() if HARD_NEGATIVES in p.name) == []


def test_without_numba_it_says_what_to_install(copy, tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('No module named numba')")
    code, out, err = launch(*COMMAND, copy, PYTHONPATH=str(tmp_path))
    assert code == 2, out + err
    assert "pip install numba" in err
    assert len(err.strip().splitlines()) == 1


def test_a_place_that_cannot_be_written(copy):
    (copy / f"{HARD_NEGATIVES}.partial").write_text("a file in the way")
    assert "is not a folder, expected one that this command makes" in refused(copy)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_store(copy):
    copy.chmod(0o555)
    try:
        assert "make the store writable" in refused(copy)
    finally:
        copy.chmod(0o755)
