"""Test folders of unfinished work: what is not ours stays, wherever a link or a name leads."""

import os

import numpy as np
import pytest

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.build import build
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.fields import ReadOptions
from megatron_interbert.preparation.building.sources.opening import open_features
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from megatron_interbert.preparation.mining.search import MiningOptions, mine
from megatron_interbert.preparation.work_folder import own_names, remove_folder
from megatron_interbert.sample.detector import generated_store
from tests.corpus import random_regions, write_store

FACTS = {"feature_dim": 24, "num_classes": 11, "detector": {}, "soft_labels": "top_k"}


@pytest.fixture
def precious(tmp_path):
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    (folder / "thesis.tex").write_text("years")
    yield folder
    assert sorted(os.listdir(folder)) == ["plan.json", "thesis.tex"]
    assert (folder / "thesis.tex").read_text() == "years"


def store_of(tmp_path):
    folder = tmp_path / "store"
    return str(folder if folder.exists() else write_store(folder, images=5))


def mining(tmp_path, restart):
    mine(RegionStore(store_of(tmp_path)), MiningOptions(), restart=restart)


def building(tmp_path, restart):
    source = open_features(store_of(tmp_path), "auto", ReadOptions())
    build(BuildPlan([source], str(tmp_path / "out")), restart=restart)


def writing(tmp_path, restart):
    RegionStoreWriter(tmp_path / "out", **FACTS)


def generating(tmp_path, restart):
    with generated_store(tmp_path / "out", 0, ["cat"], ["[PAD]"]):
        raise AssertionError("it has begun")


WORK = [
    (mining, "store/hard_negatives.npy.partial"),
    (building, "out.partial"),
    (writing, "out.partial"),
    (generating, "out.new"),
    (generating, "out.new.partial"),
]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(("work", "place"), WORK)
def test_a_link_in_place_of_a_work_folder_is_refused(tmp_path, precious, work, place, restart):
    if work is mining:
        store_of(tmp_path)
    (tmp_path / place).symlink_to(precious)
    with pytest.raises(UsageError, match=r"is a link to .*nothing was touched"):
        work(tmp_path, restart)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(("work", "place"), WORK)
def test_a_work_folder_with_files_of_others_is_refused(tmp_path, work, place, restart):
    if work is mining:
        store_of(tmp_path)

    (tmp_path / place).mkdir()
    for name in ("assembled.npy", "shard-00000.h5", "thesis.tex"):
        (tmp_path / place / name).write_text("years")
    with pytest.raises(UsageError, match="which this command did not make; nothing was removed"):
        work(tmp_path, restart)

    assert len(list((tmp_path / place).iterdir())) == 3


def test_a_generated_store_with_files_of_others_is_not_replaced(tmp_path):
    """Check also that one with a link to elsewhere is not replaced."""
    for split in ("train", "test"):
        with generated_store(
            tmp_path / split, 0, ["cat"], ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        ) as writer:
            writer.manifest["feature_dim"] = 24
            writer.manifest["num_classes"] = 11
            write_one(writer)

    (tmp_path / "train" / "notes").mkdir()
    with (
        pytest.raises(UsageError, match="holds 'notes', which this command"),
        generated_store(tmp_path / "train", 0, ["cat"], ["[PAD]"]),
    ):
        raise AssertionError("it has begun")

    (tmp_path / "test" / "pictures").symlink_to(tmp_path)
    with (
        pytest.raises(UsageError, match=r"holds 'pictures'|pictures: is a link"),
        generated_store(tmp_path / "test", 0, ["cat"], ["[PAD]"]),
    ):
        raise AssertionError("it has begun")


def write_one(writer):
    writer.add(random_regions(np.random.default_rng(0), "one"), [("a cat", "en")])


def test_an_output_that_is_a_link_to_nowhere_is_there(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    for work in (building, writing):
        with pytest.raises(UsageError, match="already exists"):
            work(tmp_path, False)


def test_finished_blocks_are_not_thrown_away_in_silence(tmp_path):
    store = RegionStore(store_of(tmp_path))
    folder = store.path / "hard_negatives.npy.partial"
    folder.mkdir()
    np.save(folder / "block-000000.npy", np.zeros((10, 30), np.int32))
    with pytest.raises(UsageError, match=r"finished blocks without their plan.json.*--restart"):
        mine(store, MiningOptions())

    assert (folder / "block-000000.npy").exists()
    mine(store, MiningOptions(), restart=True)
    assert not folder.exists()


def test_the_table_is_not_assembled_through_a_link(tmp_path, precious):
    store = RegionStore(store_of(tmp_path))
    folder = store.path / "hard_negatives.npy.partial"
    folder.mkdir()
    (folder / "assembled.npy").symlink_to(precious / "thesis.tex")
    mine(store, MiningOptions())
    assert store.hard_negatives().shape == (10, 30)


def test_only_what_matches_goes_and_in_order(tmp_path):
    for name in ("a.new", "plan.json", "x", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "b.new").mkdir()
    assert own_names(tmp_path, ("x", "*.new", "plan.json")) == ["x", "a.new", "plan.json"]
    remove_folder(tmp_path, ("x", "*.new", "plan.json"))
    assert sorted(os.listdir(tmp_path)) == [".hidden", "b.new"]
