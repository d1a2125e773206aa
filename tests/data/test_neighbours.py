"""Test faulty tables of neighbours: those of a store are refused, those of unfinished work are
computed again.
"""

import functools
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import HARD_IMAGES, HARD_NEGATIVES
from megatron_interbert.data.neighbours import NoTable, read_neighbours
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.mining.search import MiningOptions, mine
from megatron_interbert.preparation.mining.work import MiningFolder
from tests.corpus import write_store
from tests.launching import ROOT, launch

GOOD = np.arange(-1, 39).reshape(10, 4) % 10
ODD = {
    "float": GOOD.astype(np.float64),
    "nan": np.full((10, 4), np.nan),
    "complex": GOOD.astype(np.complex64),
    "truth": GOOD.astype(bool),
    "text": GOOD.astype("U8"),
    "date": GOOD.astype("M8[s]"),
    "void": np.zeros((10, 4), "V8"),
    "struct": np.zeros((10, 4), [("a", "i4"), ("b", "f4")]),
    "negative": np.full((10, 4), -1000, np.int32),
    "too large": np.full((10, 4), 10, np.int32),
    "unsigned": np.full((10, 4), 2**64 - 1, np.uint64),
    "a row less": GOOD[:9],
    "no columns": GOOD[:, :0],
    "a list": GOOD[:, 0],
    "a cube": GOOD[..., None],
}
NOT_NUMPY = {
    "empty": b"",
    "text": b"hello",
    "a zip": b"PK\x03\x04",
    "half a header": b"\x93NUMPY\x01\x00v\x00{'descr'",
    "odd header": b"\x93NUMPY\x01\x00\x08\x00{'a': (,",
    "huge": (
        b"\x93NUMPY\x01\x00\x46\x00{'descr': '<i4', 'fortran_order': False, 'shape': (10,"
        b" 9999999999999)}"
    ),
    "endless": (
        b"\x93NUMPY\x01\x00\x4e\x00"
        + b"{'descr': '<i4', 'fortran_order': False, 'shape': (10, 9999999999999999999999)}"
    ),
}
SPOILED = {
    **{what: functools.partial(np.save, arr=table) for what, table in ODD.items()},
    **{what: functools.partial(Path.write_bytes, data=data) for what, data in NOT_NUMPY.items()},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("neighbours") / "store"
    return write_store(path, images=10, captions_each=1)


@pytest.mark.parametrize("name", [HARD_NEGATIVES, HARD_IMAGES])
def test_those_of_a_store_are_refused(store, name):
    kind = "has_" + name.removesuffix(".npy")
    path = store / name

    np.save(path, GOOD)
    assert getattr(Corpus([str(store)]), kind)()

    for what, spoil in SPOILED.items():
        spoil(path)
        said = refusal(store, kind)
        assert f"{name}: cannot be read (" in said, what
        assert "mine it again with interbert mine-" in said, what
        assert "\n" not in said.strip(), what

    path.unlink()


def refusal(store, kind):
    try:
        getattr(Corpus([str(store)]), kind)()
    except UsageError as error:
        return str(error)

    return "taken"


def test_what_fits_is_mapped(tmp_path):
    for dtype in (np.int32, np.int64, np.int8, ">i4"):
        np.save(tmp_path / "x.npy", GOOD.astype(dtype))
        np.testing.assert_array_equal(read_neighbours(tmp_path / "x.npy", 10, 10), GOOD)

    with pytest.raises(NoTable):
        read_neighbours(tmp_path / "x.npy", 10, 9)
    with pytest.raises(FileNotFoundError):
        read_neighbours(tmp_path / "absent.npy", 10, 9)


def test_blocks_that_do_not_fit_are_made_anew_and_said(store, capfd):
    opened = RegionStore(str(store))
    options = MiningOptions(block=10, top=4)
    mine(opened, options)
    path = store / HARD_NEGATIVES
    whole = path.read_bytes()

    blocks = {
        **SPOILED,
        "other width": functools.partial(np.save, arr=GOOD[:, :3].astype(np.int32)),
        "other type": functools.partial(np.save, arr=GOOD.astype(np.int64)),
    }
    for what, spoil in blocks.items():
        with MiningFolder(opened, vars(options)) as folder:
            folder.open(restart=False)
            spoil(folder.path / "block-000000.npy")

        capfd.readouterr()
        mine(opened, options, overwrite=True)
        assert "block-000000.npy: " in capfd.readouterr().err, what
        assert path.read_bytes() == whole, what

    path.unlink()


def test_a_block_cut_between_a_kill_and_the_next_command(store, tmp_path):
    """Check this as users meet it: the command reports it and succeeds."""
    flags = (store, "--block", 2, "--threads", 1)
    killed = (
        "import os, runpy, sys\n"
        "from megatron_interbert.preparation.mining.work import MiningFolder\n"
        "write = MiningFolder.write_block\n"
        "def last(self, number, rows):\n"
        "    write(self, number, rows)\n"
        f"    if number == 2: os.kill(os.getpid(), {signal.SIGKILL})\n"
        "MiningFolder.write_block = last\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    code, _, _ = launch(sys.executable, "-c", killed, ROOT / "tools/mine_negatives.py", *flags)
    assert code == -signal.SIGKILL
    os.truncate(store / f"{HARD_NEGATIVES}.partial" / "block-000001.npy", 140)
    code, out, err = launch(sys.executable, "tools/mine_negatives.py", *flags)
    assert code == 0, out + err
    assert err.count("it is computed again") == 1
    assert RegionStore(str(store)).hard_negatives().shape == (10, 30)
