"""Test region stores: written and read back, with every kind of damage reported by one error that
names file and record.
"""

import json
import multiprocessing
import pickle
import shutil

import h5py
import numpy as np
import pytest

from megatron_interbert.data.regions import Regions, has_non_finite, repair_boxes
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from tests.corpus import CLASSES, FEATURES, random_regions, write_store


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("original") / "store")


@pytest.fixture
def damaged(original, tmp_path):
    """Copy the store, to be damaged; `edit` opens a shard and records its new size in the
    manifest.
    """
    return shutil.copytree(original, tmp_path / "store")


def edit(store, change, shard="shard-00001.h5"):
    with h5py.File(store / shard, "r+") as file:
        change(file)
    manifest = json.loads((store / "manifest.json").read_text())
    for entry in [*manifest["shards"], manifest["captions_file"]]:
        entry["bytes"] = (store / entry["file"]).stat().st_size
    (store / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_written_is_read(original):
    random = np.random.default_rng(0)
    store = RegionStore(str(original))
    assert (store.num_images, store.num_captions, len(store.shards)) == (40, 80, 3)

    for number in range(40):
        expected = random_regions(random, f"image-{number}")
        got = store.read(number)
        random_captions = [random.choice(18, size=random.integers(1, 12)) for _ in range(2)]
        assert len(random_captions) == 2  # draws as much as write_store, to stay in step
        np.testing.assert_array_equal(got.features, expected.features)
        np.testing.assert_array_equal(got.class_ids, expected.class_ids)
        np.testing.assert_allclose(got.class_probs, expected.class_probs)
        np.testing.assert_allclose(got.boxes, repair_boxes(expected.boxes, (100.0, 80.0))[0])
        assert store.image_id(number) == f"image-{number}"
        assert len(store.read(number, 3).features) == min(3, len(expected.features))

    assert store.caption_image.tolist() == [i // 2 for i in range(80)]
    store.verify_hashes()


def test_shards_carry_their_captions(original):
    store = RegionStore(str(original))
    with h5py.File(original / "shard-00001.h5") as file:
        texts = file["caption_text"].asstr()[:]
        images = file["caption_image"][:]

    assert [store.caption(32 + i) for i in range(32)] == list(texts)
    assert (images + 16 == store.caption_image[32:64]).all()


def test_features_are_contiguous(original):
    with h5py.File(original / "shard-00000.h5") as file:
        assert file["image_features"].chunks is None
        assert file["image_features"].compression is None
        assert file["image_features"].dtype == np.float16


def test_chunked_shards_of_other_writers_are_read_too(damaged):
    expected = RegionStore(str(damaged)).read(20)

    def rechunk(file):
        features = file["image_features"][:]
        del file["image_features"]
        file.create_dataset(
            "image_features", data=features, chunks=(4, FEATURES), compression="gzip"
        )

    edit(damaged, rechunk)
    np.testing.assert_array_equal(RegionStore(str(damaged)).read(20).features, expected.features)


def read_in_child(store, queue):
    queue.put((store.read(39).features, store.caption(79)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_handles_are_opened_by_the_process_that_reads(original, method):
    store = RegionStore(str(original))
    expected = store.read(39).features, store.caption(79)  # the parent's handles are open now
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(store, queue))
    child.start()
    features, caption = queue.get(timeout=60)
    child.join()
    np.testing.assert_array_equal(features, expected[0])
    assert caption == expected[1]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read(39).features, expected[0])


def test_open_files_stay_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_interbert.data.store.MAX_OPEN_SHARDS", 3)
    store = RegionStore(str(write_store(tmp_path / "store", images=20, images_per_shard=2)))
    for number in [*range(20), *range(20)]:
        assert store.read(number).image_id == f"image-{number}"
    assert len(store._open) == 3


DAMAGE = {
    "missing shard": (lambda s: (s / "shard-00001.h5").unlink(), r"shard-00001.h5: missing"),
    "truncated shard": (
        lambda s: (s / "shard-00001.h5").write_bytes((s / "shard-00001.h5").read_bytes()[:-100]),
        r"shard-00001.h5: \d+ bytes, expected \d+ \(truncated",
    ),
    "missing captions": (lambda s: (s / "captions.h5").unlink(), r"captions.h5: missing"),
    "no manifest": (lambda s: (s / "manifest.json").unlink(), r"no manifest.json there"),
    "manifest is not JSON": (
        lambda s: (s / "manifest.json").write_text("{"),
        r"manifest.json is not valid JSON",
    ),
    "caption of no image": (
        lambda s: edit(s, lambda f: f["image"].__setitem__(5, 400), "captions.h5"),
        r"captions.h5: caption 5 belongs to image 400, but the store has images 0 to 39",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_seen_when_opening(damaged, kind):
    damage, message = DAMAGE[kind]
    damage(damaged)
    with pytest.raises(UsageError, match=message):
        RegionStore(str(damaged))


def replace(name, make):
    def change(file):
        values = make(file[name][:])
        del file[name]
        file[name] = values

    return change


def first_row(file):
    return int(file["pos_boxes"][4, 0])  # image 4 of the shard is image 20 of the store


RECORD_DAMAGE = {
    "wrong feature size": (
        replace("image_features", lambda v: v[:, :7]),
        r"image_features has 7 columns, expected feature_dim 24",
    ),
    "missing dataset": (lambda f: f.__delitem__("image_bb"), r"dataset 'image_bb' is missing"),
    "NaN": (
        lambda f: f["image_features"].__setitem__((first_row(f), 3), np.nan),
        r"shard-00001.h5: image 4 \(image-20\): features hold NaN",
    ),
    "infinity": (
        lambda f: f["image_features"].__setitem__((first_row(f), 3), -np.inf),
        r"image-20\): features hold NaN or infinity",
    ),
    "class id": (
        lambda f: f["class_ids"].__setitem__((first_row(f), 0), 99),
        r"\(image-20\): class ids \d+ to 99, expected 0 to 10",
    ),
    "NaN box": (
        lambda f: f["image_bb"].__setitem__((first_row(f), 2), np.nan),
        r"\(image-20\): boxes hold NaN",
    ),
    "negative probability": (
        lambda f: f["class_probs"].__setitem__((first_row(f), 1), -0.1),
        r"\(image-20\): class_probs are not probabilities",
    ),
    "no size": (
        lambda f: f["image_sizes"].__setitem__((4, 0), 0),
        r"\(image-20\): image size is \(0.0, 80.0\)",
    ),
    "rows beyond the end": (
        lambda f: f["pos_boxes"].__setitem__((4, 1), 10**6),
        r"pos_boxes points beyond",
    ),
    "no regions": (lambda f: f["pos_boxes"].__setitem__(4, [3, 3]), r"image 4 has no regions"),
    "other counts": (replace("caption_image", lambda v: v[:-1]), r"manifest.json says"),
}


@pytest.mark.parametrize("kind", RECORD_DAMAGE)
def test_damage_seen_when_reading(damaged, kind):
    change, message = RECORD_DAMAGE[kind]
    edit(damaged, change)
    store = RegionStore(str(damaged))
    store.read(0)  # another shard is not affected
    with pytest.raises(UsageError, match=message):
        store.read(20)


def test_flipped_byte_is_found_on_demand(damaged):
    data = bytearray((damaged / "shard-00001.h5").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "shard-00001.h5").write_bytes(bytes(data))
    with pytest.raises(UsageError, match=r"shard-00001.h5: sha256 differs"):
        RegionStore(str(damaged)).verify_hashes()


def test_boxes_outside_or_inverted_are_clipped_or_refused(damaged):
    edit(damaged, lambda f: f["image_bb"].__setitem__(first_row(f), [90.0, 70.0, 20.0, 160.0]))
    store = RegionStore(str(damaged))
    assert store.read(20).boxes[0].tolist() == [20.0, 70.0, 90.0, 80.0]
    assert store.repaired_boxes == 1
    with pytest.raises(UsageError, match=r"\(image-20\): 1 boxes outside the image or inverted"):
        RegionStore(str(damaged), strict_boxes=True).read(20)


def test_writer_counts_repaired_boxes_and_refuses_in_strict_mode(tmp_path):
    regions = random_regions(np.random.default_rng(3), "a")
    regions.boxes[0] = [-5, 0, 400, 10]
    options = {
        "feature_dim": FEATURES,
        "num_classes": CLASSES,
        "detector": {"name": "x", "revision": ""},
        "soft_labels": "top_k",
    }
    with RegionStoreWriter(tmp_path / "clipped", **options) as writer:
        writer.add(regions, [("a", "en")])

    assert RegionStore(str(tmp_path / "clipped")).manifest["repaired_boxes"] >= 1
    regions.boxes[0] = [-5, 0, 400, 10]

    with (
        pytest.raises(UsageError, match="image a: 1 boxes"),
        RegionStoreWriter(tmp_path / "strict", strict_boxes=True, **options) as writer,
    ):
        writer.add(regions, [("a", "en")])

    assert not list(tmp_path.glob("strict*")), "nothing half-written remains"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("features", np.zeros((3, 7), np.float16), "features of a wrong shape"),
        ("features", np.full((3, FEATURES), np.nan, np.float16), "NaN"),
        ("features", np.full((3, FEATURES), 1e6, np.float32), "beyond float16"),
        ("class_ids", np.full((3, 3), CLASSES), "class ids 11 to 11"),
        ("boxes", np.zeros((2, 4), np.float32), "boxes of a wrong shape"),
    ],
)
def test_writer_refuses_bad_records(tmp_path, field, value, message):
    regions = Regions(
        "bad",
        (10.0, 10.0),
        np.zeros((3, FEATURES), np.float16),
        np.zeros((3, 4), np.float32),
        np.zeros((3, 3), np.int64),
        np.zeros((3, 3), np.float32),
    )
    setattr(regions, field, value)
    writer = RegionStoreWriter(
        tmp_path / "s", feature_dim=FEATURES, num_classes=CLASSES, detector={}, soft_labels="top_k"
    )
    with pytest.raises(UsageError, match=message):
        writer.add(regions, [])


def test_writer_does_not_overwrite(original):
    with pytest.raises(UsageError, match="already exists"):
        RegionStoreWriter(original, feature_dim=1, num_classes=1, detector={}, soft_labels="dense")


def test_non_finite_check_equals_numpy():
    for value in (0.0, 65504.0, -65504.0, 6e-8, np.inf, -np.inf, np.nan):
        array = np.array([[1.0, value]], np.float16)
        assert has_non_finite(array) == (not np.isfinite(array).all())


def test_soft_labels_of_one_store_have_one_width(tmp_path):
    """Check this because rows are read by one width for the whole store: rows of another width
    would be read as garbage.
    """
    random = np.random.default_rng(0)
    facts = {
        "feature_dim": FEATURES,
        "num_classes": CLASSES,
        "detector": {},
        "soft_labels": "top_k",
    }
    other = random_regions(random, "b")
    other.class_ids = other.class_ids[:, :2]
    other.class_probs = other.class_probs[:, :2]

    with RegionStoreWriter(tmp_path / "s", **facts, images_per_shard=1) as writer:
        writer.add(random_regions(random, "a"), [("x", "en")])
        with pytest.raises(UsageError, match="soft labels with 2 entries, expected 3"):
            writer.add(other, [("y", "en")])
