"""Test boxes as shares of the image, of other types and missing; and what holds no features."""

import pickle
import shutil
import tarfile

import h5py
import numpy as np
import pytest

from megatron_interbert.data.regions import Regions
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from megatron_interbert.preparation.inspection.report import InspectionOptions, inspect_store
from tests.preparation import published
from tests.preparation.formats import encoded, made_up_images, write_lmdb, write_npz
from tests.preparation.reading_features import built, check, refusal
from tests.shared import SHARED

FIELD = SHARED / "data" / "field"
BOTTOM_UP = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")


@pytest.fixture
def images():
    return made_up_images(6)


def test_boxes_of_other_types(tmp_path, images):
    """Check float64 and whole numbers, whose bytes as float32 would look like shares."""
    for image in images:
        image["boxes"] = np.round(image["boxes"])

    for number, code in enumerate((np.float64, np.int32, np.int64)):
        lines = []
        for image in images:
            values = [image["image_id"], 100, 80, len(image["boxes"])]
            values += [encoded(image["boxes"], code), encoded(image["features"], np.float32)]
            lines.append("\t".join(map(str, values)) + "\n")

        (tmp_path / f"{number}.tsv").write_text("".join(lines))
        found, _, how = built(tmp_path / f"{number}.tsv", tmp_path / f"store-{number}")
        check(found, images, "none")
        assert "boxes in pixels" in how


@pytest.mark.parametrize("form", ["tsv", "npz", "hdf5", "pickles"])
def test_boxes_as_shares_are_multiplied_by_the_size(tmp_path, images, form):
    """Check shares in a field that usually has pixels: nothing but their values tells."""
    box = published.shares
    if form == "tsv":
        path = published.tsv_of(tmp_path / "x.tsv", images, BOTTOM_UP, boxes=box)
    elif form == "npz":
        path = write_npz(tmp_path / "npz", [{**i, "boxes": box(i)} for i in images])
    elif form == "hdf5":
        scaled = [{**image, "boxes": box(image)} for image in images]
        path = published.columns(tmp_path / "x.h5", scaled, 9, published.ALL)
    else:
        scaled = [{**image, "boxes": box(image)} for image in images]
        path = published.mmf_lmdb(tmp_path / "x.lmdb", scaled)

    labels = {"npz": "top", "pickles": "dense"}.get(form, "none")
    found, _, how = built(path, tmp_path / "store")
    check(found, images, labels, tolerance=1e-3)
    assert "boxes are shares of the image, multiplied by its size" in how


def written(path, images, size, box=None, more=None):
    """Write a store without the readers; return the verdicts of an inspection by subject."""
    facts = {"feature_dim": 8 + (6 if more else 0), "num_classes": 1601, "soft_labels": "none"}
    with RegionStoreWriter(path, **facts, detector={"name": "x"}) as writer:
        for image in images:
            features = image["features"]
            if more:
                features = np.concatenate([features, more(image)], 1)
            labels = np.zeros((len(features), 10))
            boxes = box(image) if box else image["boxes"]
            name = published.name_of(image)
            writer.add(Regions(name, size, features, boxes, labels.astype(np.int32), labels), [])

    report = inspect_store(RegionStore(str(path)), InspectionOptions())
    return {verdict.about: (verdict.level, verdict.what) for verdict in report.verdicts}


def test_the_inspection_finds_what_was_read_wrongly(tmp_path):
    """Check shares beside a size in pixels, also of small images, and box numbers left in the
    features; and that right stores, of known and of unknown size, are not called wrong.
    """
    images = made_up_images(40)
    level, text = written(tmp_path / "a", images, (100.0, 80.0), published.shares)["box format"]
    assert level == "problem"
    assert "shares of the image, not pixels" in text
    small = written(tmp_path / "b", images, (6.0, 5.0), published.shares)["box format"]
    assert small[0] == "problem"
    unknown = written(tmp_path / "c", images, (1.0, 1.0), published.shares)["box format"]
    assert unknown[0] == "ok"
    assert "shares of a size that is unknown" in unknown[1]
    verdicts = written(tmp_path / "d", images, (100.0, 80.0))
    assert verdicts["box format"][0] == "ok"
    assert "boxes in features" not in verdicts
    verdicts = written(tmp_path / "e", images, (100.0, 80.0), more=lambda i: published.shares(i, 6))
    assert verdicts["boxes in features"][0] == "problem"


def test_shares_as_corner_and_size(tmp_path, images):
    def corner_and_size(image):
        return published.shares(image, 6)[:, [0, 1, 4, 5]]

    path = published.tsv_of(tmp_path / "x.tsv", images, BOTTOM_UP, boxes=corner_and_size)
    found, _, _ = built(path, tmp_path / "store", box_format="xywh")
    check(found, images, "none", tolerance=1e-3)


def test_shares_of_images_of_unknown_size_are_kept(tmp_path, images):
    """Check a field that usually has pixels, and no size: only shares can be used."""
    (tmp_path / "npz").mkdir()
    for image in images:
        fields = {"x": image["features"].T, "bbox": published.shares(image)}
        np.savez(tmp_path / "npz" / f"{published.name_of(image)}.npz", **fields)

    found, _, how = built(tmp_path / "npz", tmp_path / "store")
    check(found, images, "none", (1.0, 1.0))
    assert "shares of images of unknown size" in how


@pytest.mark.parametrize("few", ["pixels", "shares"])
def test_boxes_of_two_kinds_in_one_source(tmp_path, few):
    """Check that the kind of the most images counts, and that the others are dropped."""
    images = made_up_images(12)

    def box(image):
        odd = published.name_of(image) == "image-3"
        return published.shares(image) if odd == (few == "shares") else image["boxes"]

    path = published.tsv_of(tmp_path / "x.tsv", images, BOTTOM_UP, boxes=box)
    found, manifest, _ = built(path, tmp_path / "store", max_dropped=0.1)
    check(found, [i for i in images if published.name_of(i) != "image-3"], "none", tolerance=1e-3)
    assert len(manifest["dropped"]) == 1
    assert "boxes" in next(iter(manifest["dropped"]))
    with pytest.raises(UsageError, match="1 of 12 images cannot be used"):
        built(path, tmp_path / "strict", max_dropped=0.05)


def test_arrays_without_boxes_are_refused_in_the_right_words(tmp_path, images):
    (tmp_path / "scan").mkdir()
    for split in ("train", "dev"):
        np.save(tmp_path / "scan" / f"{split}_ims.npy", np.zeros((5, 36, 8), np.float32))
        (tmp_path / "scan" / f"{split}_caps.txt").write_text("a dog\n" * 25)

    (tmp_path / "each").mkdir()
    np.save(tmp_path / "each" / "9.npy", np.zeros((36, 8), np.float32))
    for path in ("scan", "scan/train_ims.npy", "each", "each/9.npy"):
        message = refusal(tmp_path / path)
        assert "features alone, without boxes" in message
        assert "extract them again" in message

    features = {"features": images[0]["features"], "image_w": 100, "image_h": 80}
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "9.npz", **features)
    assert "'boxes' is missing: found features, image_w, image_h" in refusal(tmp_path / "npz")
    columns = published.columns(tmp_path / "x.h5", images, 9, ("features", *(None,) * 4, "ids"))
    assert "'boxes' is missing" in refusal(columns)


def test_what_holds_no_features_is_called_by_its_name(tmp_path, images):
    import torch

    torch.save({"features": torch.zeros(3)}, tmp_path / "x.pt")
    torch.save([1], tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "pickled").write_bytes(pickle.dumps([1, 2], 4))
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    (tmp_path / "x.tsv.gz").write_bytes(b"\x1f\x8b" + bytes(50))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "x.json")

    for name, words in {
        "x.pt": "a file of torch.save",
        "old.pth": "a file of torch.save",
        "x.pkl": "a pickle",
        "pickled": "a pickle",
        "x.json": "a .json file",
        "x.png": "interbert extract-features",
        "x.tsv.gz": "unpack it",
        "x.tar": "a tar archive",
    }.items():
        assert words in refusal(tmp_path / name), name

    for name, content in {"photos": "x.png", "tensors": "x.pt", "tables": "a.tsv"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_bytes(b"x")
    shutil.copy(tmp_path / "x.png", tmp_path / "photos" / "y.jpg")
    assert "extract-features" in refusal(tmp_path / "photos")
    assert "pickles of each image" in refusal(tmp_path / "tensors")
    assert "give its files one by one: a.tsv" in refusal(tmp_path / "tables")

    texts = write_lmdb(tmp_path / "txt.db", [(b"1", b"\x04\x22\x4d\x18" + bytes(40))])
    assert "give UNITER's img_db, not its txt_db" in refusal(texts)
    with h5py.File(tmp_path / "grid.h5", "w") as file:
        file["grid"] = np.zeros((3, 7, 7, 8))
    assert "no dataset of features, found grid" in refusal(tmp_path / "grid.h5")
