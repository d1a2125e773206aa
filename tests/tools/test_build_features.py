"""Test tools/build_features.py: all formats give the same store; pitfalls of real files."""

import json
import pickle

import numpy as np

from tests.preparation.formats import (
    adaptive_hdf5,
    bottom_up_line,
    lxmert_line,
    npz_fields,
    real_images,
    tensorpack_lmdb,
    vilbert_lmdb,
    write_npz,
)
from tests.shared import SHARED, needs_shared
from tests.tools.building import build, content, refused, tsv

DATA = SHARED / "data"
CLASSES = "image_id,image_w,image_h,num_boxes,boxes,features,objects_id,objects_conf"


@needs_shared
def test_ten_real_images_are_byte_equal_from_every_format(tmp_path):
    images = real_images()
    assert len(images) == 10
    captions = DATA / "region_features" / "captions.jsonl"
    (tmp_path / "six.tsv").write_text("".join(map(bottom_up_line, images)))
    (tmp_path / "eight.tsv").write_text(
        "".join(bottom_up_line(image, classes=True) for image in images)
    )
    sources = {
        "npz": (write_npz(tmp_path / "npz", images),),
        "lxmert": (DATA / "lxmert_tsv" / "train2014_obj36.tsv",),
        "lmdb": (vilbert_lmdb(tmp_path / "vilbert.lmdb", images), "--trust-pickle"),
        "six": (tmp_path / "six.tsv",),
        "eight": (tmp_path / "eight.tsv", "--columns", CLASSES),
    }
    stores = {
        name: build(tmp_path / name / "store", *flags, "--captions", captions)[0]
        for name, flags in sources.items()
    }
    expected = {r.image_id: r for r in map(stores["npz"].read, range(10))}

    for name, store in stores.items():
        assert store.num_images == 10
        for got in map(store.read, range(10)):
            for field in (
                ("features", "boxes")
                if name == "six"
                else ("features", "boxes", "class_ids", "class_probs")
            ):
                assert (
                    getattr(got, field).tobytes()
                    == getattr(expected[got.image_id], field).tobytes()
                ), (name, field)

    assert stores["six"].manifest["soft_labels"] == "none", "six columns hold no labels"
    assert stores["lxmert"].manifest["soft_labels"] == "top_1_confidence"


@needs_shared
def test_all_real_images(tmp_path):
    """Build 20 images, two of them with whole distributions; boxes up to 69 pixels outside are
    clipped and counted.
    """
    flags = (
        "--captions",
        DATA / "region_features" / "captions.jsonl",
        "--class-names",
        DATA / "vocab" / "objects_vocab.txt",
        "--vocab-file",
        DATA / "vocab" / "bert-base-uncased-vocab.txt",
    )
    store, out = build(tmp_path / "real", DATA / "region_features" / "npz", *flags)
    assert "20 images (labels: 2 dense, 18 top_1_confidence), 807 regions, 59 captions" in out
    assert "14 boxes clipped" in out
    assert "warning" not in out
    assert store.manifest["images_by_label_kind"] == {"dense": 2, "top_1_confidence": 18}

    for number in range(20):
        source = npz_fields(DATA / "region_features" / "npz" / f"{store.image_id(number)}.npz")
        regions = store.read(number)
        np.testing.assert_array_equal(regions.features, source["features"].astype(np.float16))
        assert regions.boxes.min() >= 0
        assert (regions.boxes[:, [0, 2]] <= regions.size[0]).all()

        if "cls_prob" in source:
            np.testing.assert_array_equal(regions.class_ids[:, 0], source["cls_prob"].argmax(1))
            np.testing.assert_array_equal(regions.class_probs[:, 0], source["cls_prob"].max(1))
        else:
            np.testing.assert_array_equal(regions.class_ids[:, 0], source["cls_id_1601"])


@needs_shared
def test_class_ids_of_caffe_start_without_background(tmp_path):
    """Check that id 0 of the TSV, the first word of the vocabulary, is class 1 of the store.

    With the wrong --class-ids, the labels differ.
    """
    line = (DATA / "lxmert_tsv" / "train2014_obj36.tsv").read_text().splitlines()[0].split("\t")
    import base64

    ids = np.frombuffer(base64.b64decode(line[3]), np.int64)
    right, _ = build(tmp_path / "right", DATA / "lxmert_tsv" / "train2014_obj36.tsv")
    wrong, _ = build(
        tmp_path / "wrong",
        DATA / "lxmert_tsv" / "train2014_obj36.tsv",
        "--class-ids",
        "background-first",
    )
    np.testing.assert_array_equal(right.read(0).class_ids[:, 0], ids + 1)
    np.testing.assert_array_equal(wrong.read(0).class_ids[:, 0], ids)


def test_boxes_as_corner_and_size(tmp_path, images):
    expected, _ = build(tmp_path / "corners", tsv(tmp_path / "corners.tsv", images))
    for image in images:
        image["boxes"][:, 2:] -= image["boxes"][:, :2]

    path = tsv(tmp_path / "sizes.tsv", images)
    got, out = build(tmp_path / "sizes", path, "--box-format", "xywh")
    for number in range(12):
        np.testing.assert_allclose(got.read(number).boxes, expected.read(number).boxes, atol=1e-4)

    assert "warning" not in out
    _, out = build(tmp_path / "wrong", path)
    assert "if they are x, y, width, height, use --box-format xywh" in out


def test_lmdb_rows_of_pretraining_carry_their_captions(tmp_path, images):
    captions = [f"caption  number {number}" for number in range(12)]
    store, _ = build(tmp_path / "store", tensorpack_lmdb(tmp_path / "rows.lmdb", images, captions))
    assert [store.caption(i) for i in range(12)] == [
        f"caption number {number}" for number in range(12)
    ]
    assert store.manifest["soft_labels"] == "dense"

    for number, image in enumerate(images):
        np.testing.assert_array_equal(store.read(number).class_ids[:, 0], image["cls_id_1601"])
        np.testing.assert_array_equal(
            store.read(number).features, image["features"].astype(np.float16)
        )


def test_adaptive_hdf5_finds_sizes_and_names(tmp_path, images):
    names = adaptive_hdf5(tmp_path / "adaptive.hdf5", images)
    (tmp_path / "ids.pkl").write_bytes(pickle.dumps({name: row for row, name in enumerate(names)}))
    assert "give the file that has them with --image-ids" in refused(
        tmp_path / "adaptive.hdf5", "--output", tmp_path / "none"
    )
    flags = (tmp_path / "adaptive.hdf5", "--image-ids", tmp_path / "ids.pkl")
    (tmp_path / "number.pkl").write_bytes(pickle.dumps(12))
    message = refused(
        tmp_path / "adaptive.hdf5",
        "--image-ids",
        tmp_path / "number.pkl",
        "--trust-pickle",
        "--output",
        tmp_path / "no",
    )
    assert "holds one int, expected a list of names" in message
    (tmp_path / "ids.txt").write_text(
        "".join(f"photo {row} of {name}.jpg\n" for row, name in enumerate(names))
    )
    blanks, _ = build(
        tmp_path / "blanks", tmp_path / "adaptive.hdf5", "--image-ids", tmp_path / "ids.txt"
    )
    assert blanks.image_id(3) == f"photo 3 of {names[3]}.jpg"
    assert "is a pickle; give --trust-pickle" in refused(*flags, "--output", tmp_path / "none")
    store, _ = build(tmp_path / "store", *flags, "--trust-pickle")

    for number, image in enumerate(images):
        got = store.read(number)
        assert got.image_id == image["image_id"]
        assert got.size == (100.0, 80.0)
        np.testing.assert_allclose(got.boxes, image["boxes"].clip(0, [100, 80, 100, 80]), atol=1e-5)

    assert store.manifest["soft_labels"] == "none"


def test_labels_in_a_pickle_are_not_lost_in_silence(tmp_path, images):
    """Check npz files as bottom-up-attention.pytorch writes them: x, bbox, and all else in a
    pickled `info`.
    """
    (tmp_path / "npz").mkdir()

    for image in images:
        info = {"objects": image["cls_id_1601"] - 1, "objects_conf": image["cls_conf"]}
        fields = {
            "x": image["features"],
            "bbox": image["boxes"],
            "image_w": image["image_w"],
            "image_h": image["image_h"],
        }

        np.savez(
            tmp_path / "npz" / f"{image['image_id']}.npz",
            **fields,
            info=np.array(info, dtype=object),
        )

    assert "its classes may be in a pickle and --trust-pickle was not given" in refused(
        tmp_path / "npz", "--output", tmp_path / "a"
    )
    store, out = build(tmp_path / "b", tmp_path / "npz", "--trust-pickle")
    assert "12 images (labels: 12 top_1_confidence)" in out
    by_id = {str(image["image_id"]): image for image in images}

    for number in range(12):
        np.testing.assert_array_equal(
            store.read(number).class_ids[:, 0], by_id[store.image_id(number)]["cls_id_1601"]
        )


def test_two_spellings_of_a_name_are_two_images(tmp_path, images):
    """Check that each has the captions that name it exactly, and that both stay."""
    images[3]["image_id"] = "000000000042"
    images[7]["image_id"] = "COCO_val2014_000000000042.jpg"
    path = tsv(tmp_path / "x.tsv", images)
    captions = tmp_path / "captions.jsonl"
    captions.write_text(
        "".join(
            json.dumps({"image_id": str(i["image_id"]), "caption": f"a dog by {i['image_id']}"})
            + "\n"
            for i in images
        )
    )
    store, out = build(tmp_path / "with", path, "--captions", captions)
    assert "dropped" not in out
    assert (store.num_images, store.num_captions) == (12, 12)

    for number, image in enumerate(store.caption_image):
        assert store.caption(number) == f"a dog by {store.image_id(int(image))}"

    assert build(tmp_path / "without", path)[0].num_images == 12


def test_stores_are_joined_cut_anew_and_taken_apart(tmp_path, images):
    first, _ = build(
        tmp_path / "first", write_npz(tmp_path / "a", images[:7]), "--images-per-shard", 3
    )
    second, _ = build(
        tmp_path / "second", write_npz(tmp_path / "b", images[5:]), "--images-per-shard", 2
    )
    assert (len(first.shards), len(second.shards)) == (3, 4)
    both, out = build(
        tmp_path / "both", tmp_path / "first", tmp_path / "second", "--images-per-shard", 4
    )
    in_folders = sorted(images[:7], key=lambda image: str(image["image_id"])) + sorted(
        images[7:], key=lambda image: str(image["image_id"])
    )
    twice = [str(image["image_id"]) for image in images[5:7]]
    names = [str(image["image_id"]) for image in in_folders]
    ids = [both.image_id(i) for i in range(both.num_images)]
    assert [name for name in ids if "/" not in name] == [n for n in names if n not in twice]
    assert sorted(name for name in ids if "/" in name) == sorted(
        f"{store}/{name}" for store in ("first", "second") for name in twice
    )
    assert "4 images share an id with an image of another source" in out
    assert both.manifest["images_by_label_kind"] == {"top_1_confidence": 14}
    assert both.manifest["soft_labels"] == "top_1_confidence"
    direct, _ = build(tmp_path / "direct", tsv(tmp_path / "all.tsv", in_folders))

    for number, name in enumerate(names):
        for of_store in [name] if name in ids else [f"first/{name}", f"second/{name}"]:
            for field in ("features", "boxes", "class_ids", "class_probs"):
                assert (
                    getattr(both.read(ids.index(of_store)), field).tobytes()
                    == getattr(direct.read(number), field).tobytes()
                )

    (tmp_path / "keep.txt").write_text("image-3\nimage-8.jpg\nnone\n")
    part, _ = build(tmp_path / "part", tmp_path / "both", "--only", tmp_path / "keep.txt")
    assert [part.image_id(i) for i in range(part.num_images)] == ["image-3", "image-8"]
    build(tmp_path / "other", tmp_path / "a", "--detector", "another")
    stores = tmp_path / "first", tmp_path / "other"
    assert "--allow-other-detector" in refused(*stores, "--output", tmp_path / "none")
    assert "a region store records its own" in refused(
        stores[0], "--detector", "a third", "--output", tmp_path / "none"
    )
    mixed, _ = build(tmp_path / "mixed", *stores, "--allow-other-detector")
    assert mixed.manifest["detector"] == {
        **first.manifest["detector"],
        "joined_with": [{"name": "another", "revision": ""}],
    }


def test_a_header_does_not_decide_the_size_of_shards(tmp_path, images):
    names = "\t".join(
        [
            "img_id",
            "img_h",
            "img_w",
            "objects_id",
            "objects_conf",
            "attrs_id",
            "attrs_conf",
            "num_boxes",
            "boxes",
            "features",
        ]
    )
    (tmp_path / "x.tsv").write_text(names + "\n" + "".join(map(lxmert_line, images)))
    store, _ = build(tmp_path / "store", tmp_path / "x.tsv", "--images-per-shard", 6)
    assert store.num_images == 12
    assert len(store.shards) <= 4


def test_processes_leave_no_trace(tmp_path, images):
    path = tsv(tmp_path / "x.tsv", images)
    for name, workers in (("one", 1), ("two", 2)):
        build(tmp_path / name, path, "--workers", workers, "--images-per-shard", 3)
    assert content(tmp_path / "one") == content(tmp_path / "two")
