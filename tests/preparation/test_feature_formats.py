"""Test the readers of region features: the samples of the field with their right answers, and
further members of each kind, written here.
"""

import base64
import json
import pickle

import h5py
import lmdb
import numpy as np
import pytest

from megatron_interbert.data.store import RegionStore
from megatron_interbert.preparation.building.sources.names import NAMES, OURS
from tests.preparation import published
from tests.preparation.formats import (
    bottom_up_line,
    encoded,
    made_up_images,
    tensorpack_lmdb,
    write_lmdb,
)
from tests.preparation.reading_features import built, check, opened, refusal
from tests.shared import SHARED, needs_shared

FIELD = SHARED / "data" / "field"
COCO = [f"COCO_train2014_{number:012d}" for number in (9, 25, 30, 34)]
BOTTOM_UP = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
VOLTA = (
    *("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf"),
    *("num_boxes", "boxes", "features", "cls_prob", "attrs", "classes"),
)


@pytest.fixture
def images():
    return made_up_images(6)


@needs_shared
@pytest.mark.parametrize(
    ("path", "names", "labels", "features"),
    [
        ("plain/f.tsv", COCO, "none", 16),
        ("bom/f.tsv", COCO, "none", 16),
        ("mmf/npy", COCO, "dense", 16),
        ("mmf/detectron.lmdb", COCO, "dense", 16),
        ("volta_h5/volta_boxes36.h5", COCO, "dense", 16),
        ("volta_h5/volta_boxes36.lmdb", COCO, "dense", 16),
        ("uniter/feat_th0.2_max100_min10", [n.lower() for n in COCO], "dense", 16),
        ("vinvl/predictions.tsv", ["9", "25", "30", "34"], "none", 16),
        ("vinvl/feature.tsv", ["9", "25", "30", "34"], "none", 16),
        ("spare_rows/train36.hdf5", ["9", "25", "30", "34"], "none", 16),
    ],
)
def test_samples_of_the_field(tmp_path, path, names, labels, features):
    ids = FIELD / "spare_rows" / "train36_imgid2idx.pkl" if "spare" in path else ""
    found, manifest, how = built(FIELD / path, tmp_path / "store", image_ids=ids)
    size = (1.0, 1.0) if "uniter" in path else (640.0, 480.0)
    assert sorted(found) == sorted(names)
    assert manifest["images_by_label_kind"] == {labels: 4}
    assert manifest["feature_dim"] == features
    assert {regions.size for regions in found.values()} == {size}
    assert how.startswith(f"{FIELD / path}: ")
    assert "\n" not in how
    if "spare" in path:
        assert "2 rows without a name, of 6" in how


@needs_shared
def test_values_of_the_samples(tmp_path):
    """Compare with the arrays that the samples hold, read here without the readers."""
    mmf, _, _ = built(FIELD / "mmf" / "npy", tmp_path / "mmf")
    for name, got in mmf.items():
        info = np.load(FIELD / "mmf" / "npy" / f"{name}_info.npy", allow_pickle=True).item()
        features = np.load(FIELD / "mmf" / "npy" / f"{name}.npy").astype(np.float16)
        np.testing.assert_array_equal(got.features, features)
        np.testing.assert_array_equal(got.class_ids[:, 0], info["cls_prob"].argmax(1) + 1)
        np.testing.assert_array_equal(got.boxes, info["bbox"])

    one, _, _ = built(FIELD / "volta_h5" / "volta_boxes36.h5", tmp_path / "h5")
    two, _, _ = built(FIELD / "volta_h5" / "volta_boxes36.lmdb", tmp_path / "lmdb")
    with h5py.File(FIELD / "volta_h5" / "volta_boxes36.h5") as file:
        for name, got in one.items():
            for field in ("features", "boxes", "size"):
                np.testing.assert_array_equal(getattr(got, field), getattr(two[name], field))
            for store in (got, two[name]):
                objects = file[name]["objects_id"][:]
                np.testing.assert_array_equal(store.class_ids[:, 0], objects + 1)
            dense = file[name]["cls_prob"][:]
            rows = np.arange(len(dense))
            np.testing.assert_array_equal(got.class_probs[:, 0], dense[rows, objects + 1])
            dense[rows, objects + 1] = 0
            others = np.sort(dense, 1)[:, ::-1]
            np.testing.assert_array_equal(got.class_probs[:, 1:], others[:, :9])

    uniter, _, _ = built(FIELD / "uniter" / "feat_th0.2_max100_min10", tmp_path / "uniter")
    with (
        lmdb.open(
            str(FIELD / "uniter" / "feat_th0.2_max100_min10"), readonly=True, lock=False
        ) as environment,
        environment.begin() as view,
    ):
        for name, got in uniter.items():
            row = view.get(f"{name}.npz".encode())
            raw = got.boxes.astype(np.float16)
            assert raw[0].tobytes() in row, "the shares are those of the file"

    for name in ("predictions", "feature"):
        vinvl, _, _ = built(FIELD / "vinvl" / f"{name}.tsv", tmp_path / name)
        for line in (FIELD / "vinvl" / "predictions.tsv").read_text().splitlines():
            image, content = line.split("\t")
            objects = json.loads(content)["objects"]
            features = [np.frombuffer(base64.b64decode(o["feature"]), "<f4") for o in objects]
            np.testing.assert_array_equal(vinvl[image].features, np.float16(features))
            boxes = np.array([o["rect"] for o in objects]).clip(0, [640, 480, 640, 480])
            np.testing.assert_allclose(vinvl[image].boxes, boxes, atol=1e-3)


@pytest.mark.parametrize(
    ("write", "labels"),
    [
        (lambda f, i: published.mmf_npy(f / "x", i), "dense"),
        (lambda f, i: published.mmf_npy(f / "x", i, background=True), "dense"),
        (lambda f, i: published.mmf_npy(f / "x", i, rows=9), "dense"),
        (lambda f, i: published.mmf_lmdb(f / "x", i, background=True), "dense"),
    ],
)
@pytest.mark.parametrize("folder", ["", "train2014/"])
def test_mmf(tmp_path, images, write, labels, folder):
    """Check classes with and without background, padding, and folders of features."""
    for image in images:
        image["image_id"] = np.array(f"{folder}{image['image_id']}")
    path = write(tmp_path, images)
    found, _, how = built(path, tmp_path / "store")
    check(found, images, labels)
    assert "class distributions of 160" in how
    assert "pickle" in refusal(path, trust_pickle=False)


def test_npy_files_with_other_companions_and_with_everything_in_one(tmp_path, images):
    for image in images:
        name = published.name_of(image)
        (tmp_path / "apart").mkdir(exist_ok=True)
        (tmp_path / "one").mkdir(exist_ok=True)
        np.save(tmp_path / "apart" / f"{name}.npy", image["features"])
        np.save(tmp_path / "apart" / f"{name}_bbox.npy", image["boxes"])
        record = {"image_feat": image["features"], "image_bboxes": image["boxes"]}
        np.save(tmp_path / "one" / f"{name}.npy", {**record, "image_h": 80, "image_w": 100})

    sizes = published.coco_sizes(tmp_path / "sizes.json", images)
    found, _, _ = built(tmp_path / "apart", tmp_path / "a", image_sizes=str(sizes))
    check(found, images, "none")
    check(built(tmp_path / "one", tmp_path / "b")[0], images, "none")
    assert "give the sizes of the images with --image-sizes" in refusal(tmp_path / "apart")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rounded", ["float16", "float32"])
@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_floats_in_base64_are_read_as_they_were_written(tmp_path, dtype, rounded, scale):
    """Check features, a third of them zero as after ReLU, that were perhaps rounded before, and
    class distributions and confidences beside them.
    """
    images = made_up_images(4)
    chance = np.random.default_rng(3)
    header = "image_id\timage_w\timage_h\tnum_boxes\tboxes\tfeatures\tobjects_id\tobjects_conf\n"
    lines = [header]
    for image in images:
        features = chance.gamma(1.0, scale, (len(image["boxes"]), 64)) - scale / 3
        image["features"] = np.maximum(features, 0).astype(rounded).astype(dtype)
        conf = encoded(image["cls_conf"], dtype)
        line = bottom_up_line(image, classes=True).strip().split("\t")
        line[5] = encoded(image["features"], dtype)
        lines.append("\t".join([*line[:7], conf]) + "\n")

    (tmp_path / "f.tsv").write_text("".join(lines))
    found, manifest, how = built(tmp_path / "f.tsv", tmp_path / "store")
    check(found, images)
    assert manifest["feature_dim"] == 64
    assert ("features written as" in how) == (dtype != "float32")


def test_titles_in_features(tmp_path, images):
    """Check Product1M's TSV and LMDB, and captions as bytes and as lists."""
    titles = [f"红色连衣裙 {number}, new" for number in range(len(images))]
    lines = [bottom_up_line(image) for image in images]
    pairs = zip(lines, titles, strict=True)
    content = "".join(line.replace("\n", f"\t{title}\n") for line, title in pairs)
    (tmp_path / "train.tsv").write_text(content, encoding="utf-8")
    tensorpack_lmdb(tmp_path / "train_feature.lmdb", images, titles, classes=False)
    for image, title in zip(images, titles, strict=True):
        folder = tmp_path / "npz"
        folder.mkdir(exist_ok=True)
        captions = np.array([title.encode(), b"two"])
        np.savez(folder / f"{published.name_of(image)}.npz", **image, captions=captions)

    for path, own in (("train.tsv", []), ("train_feature.lmdb", []), ("npz", ["two"])):
        output = tmp_path / f"{path}.store"
        found, _, _ = built(tmp_path / path, output)
        check(found, images, "top" if own else "none")
        store = RegionStore(str(output))
        expected = [text for title in titles for text in [title, *own]]
        assert sorted(map(store.caption, range(store.num_captions))) == sorted(expected)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("columns", [6, 7])
def test_uniter(tmp_path, images, compressed, columns):
    path = published.uniter_lmdb(tmp_path / "x", images, compressed, columns)
    found, _, how = built(path, tmp_path / "store", trust_pickle=False)
    check(found, images, "dense", (1.0, 1.0), 1e-3)
    assert "shares of images of unknown size, which are kept (size 1 x 1)" in how
    sizes = published.coco_sizes(tmp_path / "sizes.json", images)
    found, _, how = built(path, tmp_path / "sized", image_sizes=str(sizes))
    check(found, images, "dense", tolerance=0.1)
    assert "multiplied by its size" in how


def test_npz_files_of_uniter(tmp_path, images):
    (tmp_path / "npz").mkdir()
    for image in images:
        fields = published.uniter_fields(image)
        np.savez(tmp_path / "npz" / f"{published.name_of(image)}.npz", **fields)

    check(built(tmp_path / "npz", tmp_path / "store")[0], images, "dense", (1.0, 1.0), 1e-3)
    name = published.name_of(images[2])
    found, _, _ = built(tmp_path / "npz" / f"{name}.npz", tmp_path / "one")
    check(found, [images[2]], "dense", (1.0, 1.0), 1e-3)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("form", ["hw.tsv", "train.hw.tsv", "words", "none"])
def test_oscar(tmp_path, images, as_json, form):
    path = tmp_path / "train.feature.tsv"
    published.oscar_tsv(path, images, as_json, quoted=form == "words")
    names = [published.name_of(image) for image in images]
    size = [{"height": 80, "width": 100}] if form == "hw.tsv" else {"height": 80, "width": 100}
    lines = [f"{name}\t{'80 100' if form == 'words' else json.dumps(size)}\n" for name in names]
    if form != "none":
        (tmp_path / ("hw.tsv" if form == "words" else form)).write_text("".join(lines))

    found, manifest, how = built(path, tmp_path / "store")
    check(found, images, "none", (1.0, 1.0) if form == "none" else (100.0, 80.0))
    assert manifest["feature_dim"] == 8
    assert "the box numbers at the end of the features are cut off" in how


def test_predictions(tmp_path, images):
    path = published.predictions_tsv(tmp_path / "predictions.tsv", images)
    found, _, how = built(path, tmp_path / "store")
    check(found, images, "none")
    assert "no classes but their names" in how
    names = ("background", "cat", "sofa,couch,dog", "bird")
    found, manifest, _ = built(path, tmp_path / "named", class_names=names)
    assert manifest["soft_labels"] == "top_1_confidence"
    assert all((regions.class_ids[:, 0] == 2).all() for regions in found.values())
    assert all((regions.class_probs[:, 0] == 0.5).all() for regions in found.values())
    assert "a class that is not in --class-names: dog" in refusal(path, class_names=names[:2])
    path = published.predictions_tsv(tmp_path / "other.tsv", images, size=False)
    assert "'width' of the image is missing" in refusal(path)


def in_bytes(value):
    return str(value) if isinstance(value, int) else str(str(value).encode())


@pytest.mark.parametrize(
    ("names", "more", "labels"),
    [
        (BOTTOM_UP, {"text": in_bytes}, "none"),
        (VOLTA, {"text": in_bytes}, "first"),
        (VOLTA, {}, "first"),
        (BOTTOM_UP, {"start": "\ufeff"}, "none"),
        (("img_id", "boxes", "img_h", "img_w", "features", "num_boxes"), {"header": True}, "none"),
        ((*BOTTOM_UP, "objects_id", "objects_conf"), {"header": True, "start": "\ufeff"}, "top"),
        ((*BOTTOM_UP, "cls_prob"), {}, "dense"),
        (BOTTOM_UP, {"text": lambda value: f'"{value}"'}, "none"),
        (BOTTOM_UP, {"text": in_bytes, "header": True, "between": ","}, "none"),
        (VOLTA[:10], {"between": ","}, "top"),
    ],
)
def test_tsv(tmp_path, images, names, more, labels):
    """Check text of bytes (b'..'), byte order marks, headers, quotes and orders of columns."""
    path = published.tsv_of(tmp_path / "x.tsv", images, names, **more)
    found, _, _ = built(path, tmp_path / "store")
    check(found, images, "dense" if labels == "first" else labels)
    crlf = tmp_path / "crlf.tsv"
    crlf.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    check(built(crlf, tmp_path / "other")[0], images, "dense" if labels == "first" else labels)


def test_lines_of_json(tmp_path, images):
    """Check JSON of each image, and an image without any object, which is dropped."""
    lines = []
    for image in images:
        region = zip(image["boxes"].tolist(), image["features"].tolist(), strict=True)
        objects = [{"id": 5, "bbox": box, "feat": row} for box, row in region]
        size = {"w": 100, "h": 80}
        lines.append({"image_id": published.name_of(image), **size, "objects": objects})

    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"objects": []}]))
    found, manifest, _ = built(path, tmp_path / "store", max_dropped=0.2)
    check(found, images, "none")
    assert manifest["dropped"] == {"no regions": 1}


def test_the_table_of_names_is_without_doubt():
    """Check that no spelling stands for two fields, and that spellings are compared in one case."""
    spellings = [name for names in NAMES.values() for name in names]
    assert len(set(spellings)) == len(spellings) == len(OURS)
    assert all(name == name.lower() for name in spellings)


def test_sizes_of_images_in_every_form(tmp_path, images):
    """Check COCO's, Visual Genome's and plain JSON, hw.tsv, and what holds no sizes."""
    path = published.by_place(
        tmp_path / "x.h5", images, lambda i, f: f"{i}_{f}", published.detections
    )
    names = [published.name_of(image) for image in images]
    size = {"width": 100, "height": 80}
    forms = {
        "coco.json": {"images": [{"id": 1, "file_name": f"{n}.jpg", **size} for n in names]},
        "vg.json": [{"image_id": n, **size} for n in names],
        "plain.json": {n: {"img_w": 100, "img_h": 80} for n in names},
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "x.hw.tsv").write_text("".join(f"{n}\t80 100\n" for n in names))

    for name in (*forms, "x.hw.tsv"):
        found, _, _ = built(path, tmp_path / f"{name} store", image_sizes=str(tmp_path / name))
        check(found, images, "dense")

    for content in ("{}", "[]", "[1]", '{"a": 1}', "a b c", "a\tb", '{"a": {"width": 1}}', "{"):
        (tmp_path / "bad").write_text(content)
        assert "sizes of images" in refusal(path, image_sizes=str(tmp_path / "bad"))


def test_rows_of_text_in_pickles(tmp_path, images):
    """Check what volta's conversion of a TSV makes: every value is text, columns that were not
    there are None.
    """
    published.tsv_of(tmp_path / "x.tsv", images, VOLTA[:10], text=in_bytes)
    rows = []
    for number, line in enumerate((tmp_path / "x.tsv").read_text().splitlines()):
        values = [*line.split("\t"), None, None, None]
        row = dict(zip(VOLTA, values, strict=True))
        rows.append((str(number).encode(), pickle.dumps(row)))

    path = write_lmdb(tmp_path / "x.lmdb", rows)
    check(built(path, tmp_path / "store")[0], images)


def test_boxes_of_kdd_cup_are_asked_for(tmp_path, images):
    header = "product_id\timage_h\timage_w\tnum_boxes\tboxes\tfeatures\tclass_labels\n"
    lines = [header]
    for image in images:
        values = bottom_up_line(image, classes=True).strip().split("\t")[:7]
        lines.append("\t".join([values[0], values[2], values[1], *values[3:]]) + "\n")

    (tmp_path / "kdd.tsv").write_text("".join(lines))
    assert "give --box-format yxyx" in opened(tmp_path / "kdd.tsv").how()
    assert "yxyx)" in (said := opened(tmp_path / "kdd.tsv", box_format="yxyx").how())
    assert "--box-format" not in said


def test_sizes_go_by_file_name_before_number(tmp_path, images):
    """Check COCO's JSON whose file names are numbers, but not those of their images."""
    entries = [
        {"id": (n + 1) % 6, "file_name": f"{n}.jpg", "width": 100 + n, "height": 80}
        for n in range(6)
    ]
    (tmp_path / "sizes.json").write_text(json.dumps({"images": entries}))
    (tmp_path / "npz").mkdir()
    for n, image in enumerate(images):
        fields = {"features": image["features"], "boxes": image["boxes"]}
        np.savez(tmp_path / "npz" / f"{n}.npz", **fields)

    sizes = str(tmp_path / "sizes.json")
    found, _, _ = built(tmp_path / "npz", tmp_path / "store", image_sizes=sizes)
    assert {name: regions.size[0] for name, regions in found.items()} == {
        str(n): 100.0 + n for n in range(6)
    }


def test_records_of_one_id_whose_regions_differ_do_not_share_captions(tmp_path, images):
    images[1]["image_id"] = images[2]["image_id"] = images[0]["image_id"]
    images[2] |= {name: images[0][name] for name in ("features", "boxes", "cls_conf")}
    images[2]["cls_id_1601"] = images[0]["cls_id_1601"]
    titles = [f"text {n}" for n in range(6)]
    tensorpack_lmdb(tmp_path / "x.lmdb", images, titles)
    _, manifest, _ = built(tmp_path / "x.lmdb", tmp_path / "store", max_dropped=0.5)
    store = RegionStore(str(tmp_path / "store"))
    texts = [store.caption(n) for n in range(store.num_captions)]
    assert sorted(texts) == ["text 0", "text 2", "text 3", "text 4", "text 5"]
    assert sum(manifest["dropped"].values()) == 2
