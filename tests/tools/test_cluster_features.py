"""Test clusters of region features: planted ones are found, every region has the nearest centroid
as brute force finds it, a killed run is resumable, pretraining predicts them, bad files are named.
"""

import os
import signal
import sys
import time

import numpy as np
import pytest

from megatron_interbert.commands.cluster_features import described
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import CENTROIDS, CLUSTERS
from megatron_interbert.data.region_batch import read_regions
from megatron_interbert.data.regions import Regions
from megatron_interbert.data.store import RegionStore
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from megatron_interbert.preparation.mining.centroids import centroids_of
from tests.corpus import VOCABULARY, WORDS
from tests.launching import launch, pretrain, ran, records, start

KINDS = 5
WIDTH = 16


def write_patches(path, seed, images=60, labels="none", kinds=KINDS):
    """Write a store whose features lie near a few directions, the same in an image, at very
    different lengths; return the kind of each region.
    """
    random = np.random.default_rng(seed)
    directions = np.eye(WIDTH)[:kinds]
    found = []

    with RegionStoreWriter(
        path,
        images_per_shard=16,
        vocabulary="\n".join(VOCABULARY) + "\n",
        feature_dim=WIDTH,
        num_classes=1 if labels == "none" else 9,
        detector={"name": "patches", "revision": ""},
        background_class=None,
        soft_labels=labels,
        text_normalisation="none",
    ) as writer:
        for number in range(images):
            count = int(random.integers(2, 12))
            kind = np.full(count, random.integers(kinds))
            features = directions[kind] + 0.05 * random.normal(size=(count, WIDTH))
            features *= 10 ** random.uniform(-1, 1, size=(count, 1))
            corners = random.uniform(0, 50, size=(count, 2))
            boxes = np.concatenate([corners, corners + 20], axis=1)
            writer.add(
                Regions(
                    f"image{number}",
                    (100.0, 80.0),
                    features.astype(np.float16),
                    boxes.astype(np.float32),
                    np.zeros((count, 1), np.int32),
                    np.full((count, 1), 0.0 if labels == "none" else 0.9, np.float32),
                ),
                [(" ".join(random.choice(WORDS[:18], size=5)), "en")],
            )
            found.append(kind)

    return np.concatenate(found)


def tool(*words):
    """Return the command line of cluster-features."""
    return (sys.executable, "tools/cluster_features.py", *words)


def all_ids(store):
    """Return the cluster of each region of a store, read as pretraining reads them."""
    corpus = Corpus([str(store)])
    corpus.label_by("clusters")
    images = np.arange(corpus.num_images)
    regions = read_regions(corpus, images, 99)
    assert (regions.class_probs == 1).all()
    assert regions.class_ids.shape[1] == 1
    return regions.class_ids[:, 0], regions.features.astype(np.float64)


@pytest.fixture
def stores(tmp_path):
    """Write two stores; return their folders and the kinds of their regions."""
    folders = tmp_path / "train", tmp_path / "valid"
    return folders, [write_patches(folder, seed) for seed, folder in enumerate(folders)]


def test_planted_clusters_are_found_in_all_stores(stores):
    folders, kinds = stores
    out = ran(*tool(*folders, "--clusters", KINDS, "--block", 7))
    assert f"in {KINDS} clusters, 0 of them empty" in out

    names = {}
    for folder, expected in zip(folders, kinds, strict=True):
        ids, features = all_ids(folder)
        pairs = set(zip(expected.tolist(), ids.tolist(), strict=True))
        assert len(pairs) == KINDS, "each kind is one cluster"
        names.setdefault("first", pairs)
        assert pairs == names["first"], "the same in both stores"

        middles = centroids_of(RegionStore(str(folder)), "--like").middles.astype(np.float64)
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        distance = np.square(unit[:, None] - middles[None]).sum(axis=2)
        np.testing.assert_array_equal(ids, distance.argmin(axis=1))

    assert "nothing to do" in ran(*tool(*folders, "--clusters", KINDS))
    RegionStore(str(folders[0])).verify_hashes()


def test_any_images_read_their_own_clusters(stores):
    (train, valid), _ = stores
    ran(*tool(train, valid, "--clusters", KINDS, "--no-unit-length"))
    joined = Corpus([str(train), str(valid)])
    joined.label_by("auto")
    assert joined.num_classes == KINDS
    assert joined.has_labels
    ids = np.concatenate([all_ids(train)[0], all_ids(valid)[0]])
    first = np.concatenate([[0], np.cumsum(joined.region_counts)])
    images = np.array([119, 3, 60, 59, 3, 0])
    regions = read_regions(joined, images, 4)
    expected = [ids[first[i] : first[i] + min(joined.region_counts[i], 4)] for i in images]
    np.testing.assert_array_equal(regions.class_ids[:, 0], np.concatenate(expected))


def test_a_killed_run_is_resumable(stores):
    """Kill it once blocks are done, and after the first store: the result is that of one run."""
    (train, valid), _ = stores
    ran(*tool(train, valid, "--clusters", 8))
    expected = [(all_ids(store)[0], (store / CENTROIDS).read_bytes()) for store in (train, valid)]

    kills = 0
    for place in (train, valid):
        command = tool(train, valid, "--clusters", 8, "--seed", 7 + kills, "--overwrite")
        command = (*command, "--block", 1)
        process = start(*command)
        work = place / f"{CLUSTERS}.partial"
        while process.poll() is None and not list(work.glob("block-0000[2-9]*.npy")):
            time.sleep(0.001)
        kills += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        left = [(store / CENTROIDS).read_bytes() for store in (train, valid)]
        assert "clusters" not in RegionStore(str(place)).manifest

        ran(*command)
        for store, centroids in zip((train, valid), left, strict=True):
            assert (store / CENTROIDS).read_bytes() == centroids, "k-means was not repeated"
            assert not (store / f"{CLUSTERS}.partial").exists()
            RegionStore(str(store)).verify_hashes()

    assert kills == 2, "both were killed in the middle"
    ran(*tool(train, valid, "--clusters", 8, "--overwrite"))
    for store, (ids, centroids) in zip((train, valid), expected, strict=True):
        np.testing.assert_array_equal(all_ids(store)[0], ids)
        assert (store / CENTROIDS).read_bytes() == centroids


def test_pretraining_predicts_clusters(stores, tmp_path):
    (train, valid), _ = stores
    ran(*tool(train, "--clusters", KINDS))
    flags = ("--model", "tiny", "--data-path", train, "--train-iters", 60, "--lr", "5e-3")
    flags += ("--micro-batch-size", 30, "--num-workers", 0, "--no-dropout", "--log-interval", 20)
    flags += ("--data-partitions", 1, "--valid-data-path", valid, "--eval-interval", 60)
    command = pretrain(*flags, "--save", tmp_path / "run")
    code, _, err = launch(*command)
    assert code == 2
    assert f"{valid}: its regions have no clusters" in err

    ran(*tool(valid, "--like", train))
    out = ran(*command)
    assert f"classes {KINDS}" in out
    lines = list(records(tmp_path / "run", "train").values())
    assert lines[-1]["mrm_loss"] < 0.9 * lines[0]["mrm_loss"]
    assert lines[0]["mrm_loss"] < 2 * np.log(KINDS)
    assert "mrm_loss" in next(iter(records(tmp_path / "run", "valid").values()))

    plain = pretrain(*flags, "--region-labels", "detector", "--save", tmp_path / "plain")
    assert "the regions have no class labels to predict" in ran(*plain)

    ran(*tool(valid, "--clusters", KINDS, "--seed", 3, "--overwrite"))
    code, _, err = launch(*command[:-2], "--save", tmp_path / "third")
    assert code == 2
    assert "its clusters have other centroids" in err


def test_labels_of_a_detector_come_first(tmp_path):
    store = tmp_path / "labelled"
    write_patches(store, 0, labels="top_1_confidence")
    ran(*tool(store, "--clusters", KINDS))
    for source, classes in (("auto", 9), ("detector", 9), ("clusters", KINDS)):
        corpus = Corpus([str(store)])
        corpus.label_by(source)
        assert corpus.num_classes == classes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "bytes, expected"),
        (lambda path: path.unlink(), "missing, but listed in manifest.json"),
        (lambda path: spoil(path, KINDS), f"indexes from 0 to {KINDS}, expected -1 to {KINDS - 1}"),
        (lambda path: spoil(path, -1), "a region without a cluster"),
    ],
)
def test_damaged_clusters(stores, damage, message):
    (train, _), _ = stores
    ran(*tool(train, "--clusters", KINDS))
    damage(train / CLUSTERS)
    code, _, err = launch(*pretrain("--model", "tiny", "--data-path", train, "--train-iters", 1))
    assert code == 2
    assert message in err
    assert "interbert cluster-features --overwrite" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", [CLUSTERS, CENTROIDS])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
        lambda path: path.unlink(),
    ],
)
def test_damaged_files_are_found_again(stores, name, damage):
    (train, _), _ = stores
    ran(*tool(train, "--clusters", KINDS, "--overwrite"))
    before = [(train / file).read_bytes() for file in (CLUSTERS, CENTROIDS)]
    damage(train / name)
    out = ran(*tool(train, "--clusters", KINDS, "--overwrite"))
    assert "its clusters are damaged, and are found again" in out
    assert [(train / file).read_bytes() for file in (CLUSTERS, CENTROIDS)] == before
    RegionStore(str(train)).verify_hashes()


def spoil(path, value):
    """Change the first cluster of a file."""
    ids = np.load(path)
    ids[0] = value
    np.save(path, ids)


def test_requests_that_cannot_be_met(stores, tmp_path):
    (train, valid), _ = stores
    write_patches(tmp_path / "other", 5, images=3)
    for words, message in (
        ((train, "--clusters", 9999), "--clusters 9999: the stores have only"),
        ((train, "--like", valid), f"--like {valid}: its regions have no clusters"),
        ((train, "--like", valid, "--clusters", 7), "--like takes the centroids"),
        ((tmp_path / "nowhere",), "no manifest.json there"),
        ((), "STORES"),
    ):
        code, _, err = launch(*tool(*words))
        assert code == 2, err
        assert message in err
        assert "Traceback" not in err
        assert not (train / CENTROIDS).exists()

    ran(*tool(train, "--clusters", KINDS))
    code, _, err = launch(*tool(train, "--clusters", 4))
    assert code == 2
    assert "has other clusters; give --overwrite to replace them" in err


def test_an_inspection_knows_clusters(stores, tmp_path):
    (train, _), _ = stores
    inspect = (sys.executable, "tools/inspect_features.py", train, "--output", tmp_path / "seen")
    ran(*tool(train, "--clusters", KINDS, "--overwrite"))
    assert f"{KINDS} clusters stand for classes" in ran(*inspect)


def test_summary_counts_what_clusters_are_worth():
    assert "40 regions in 5 clusters, 1 of them empty" in described(np.array([10, 10, 0, 10, 10]))
    assert "the largest has 25.0 %; as diverse as 4 clusters of equal size" in described(
        np.array([10, 10, 0, 10, 10])
    )
