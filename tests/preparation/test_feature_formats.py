"""Test the readers of region features: the samples of the field with their right answers, and
further members of each kind, written here.
"""

import base64
import json
import pickle
import shutil
import tarfile

import h5py
import lmdb
import numpy as np
import pytest

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.build import build
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.fields import ReadOptions
from megatron_interbert.preparation.building.sources.opening import open_features
from tests.preparation import published
from tests.preparation.formats import encoded, made_up_images, write_lmdb, write_npz
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


def opened(path, kind="auto", image_ids="", columns=(), **options):
    options = ReadOptions(**{"trust_pickle": True, **options})
    return open_features(str(path), kind, options, columns, str(image_ids))


def built(path, output, max_dropped=0.0, **options):
    """Build a store; return its images by name, its manifest, and how the source was read."""
    source = opened(path, **options)
    plan = BuildPlan([source], str(output), detector={"name": "x"})
    manifest = build(plan, max_dropped=max_dropped)
    store = RegionStore(str(output))
    found = {store.image_id(number): store.read(number) for number in range(store.num_images)}
    return found, manifest, source.how()


def refusal(path, **options):
    """Return why a path cannot be opened or read: one line."""
    with pytest.raises(UsageError) as refused:
        opened(path, **options).facts()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def check(found, images, labels="top", size=(100.0, 80.0), tolerance=1e-4):
    """Compare what was read with the fields from which the file was written."""
    assert sorted(found) == sorted(map(published.name_of, images))

    for image in images:
        got = found[published.name_of(image)]
        expected = image["boxes"].clip(0, [100, 80, 100, 80])
        if size == (1.0, 1.0):
            expected = expected / [100, 80, 100, 80]
        assert got.size == size
        np.testing.assert_array_equal(got.features, image["features"].astype(np.float16))
        np.testing.assert_allclose(got.boxes, expected, atol=tolerance)
        if labels == "none":
            assert not got.class_probs.any()
        else:
            np.testing.assert_array_equal(got.class_ids[:, 0], image["cls_id_1601"])
            likely = image["cls_conf"] if labels == "top" else np.full(len(got.boxes), 0.8)
            np.testing.assert_allclose(got.class_probs[:, 0], likely, atol=2e-3)


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
        assert "2 of 6 rows have no name and are left out" in how


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


def place_in_split(image, field):
    return f"{'train' if image in ('image-0', 'image-1') else 'val'}/{image}/{field}"


@pytest.mark.parametrize(
    ("place", "fields", "labels"),
    [
        (lambda image, field: f"{image}/{field}", published.volta_fields, "top"),
        (lambda image, field: f"{image}/{field}", published.short_fields, "top"),
        (lambda image, field: f"all/{image}/{field}", published.volta_fields, "top"),
        (lambda image, field: f"{field}/{image}", published.volta_fields, "top"),
        (lambda image, field: f"{image}_{field}", published.detections, "dense"),
    ],
)
def test_hdf5_that_keeps_images_apart(tmp_path, images, place, fields, labels):
    path = published.by_place(tmp_path / "x.h5", images, place, fields)
    sizes = published.coco_sizes(tmp_path / "sizes.json", images) if labels == "dense" else ""
    found, _, how = built(path, tmp_path / "store", image_sizes=str(sizes))
    found = {name.removeprefix("all/"): regions for name, regions in found.items()}
    check(found, images, labels)
    assert "HDF5 with a " in how


def test_groups_of_splits_and_a_group_that_is_no_image(tmp_path, images):
    path = published.by_place(tmp_path / "x.h5", images, place_in_split, published.volta_fields)
    found, _, _ = built(path, tmp_path / "store")
    check({name.split("/")[-1]: regions for name, regions in found.items()}, images)
    assert "train/image-0" in found
    path = published.by_place(
        tmp_path / "y.h5", images, lambda i, f: f"{i}/{f}", published.volta_fields
    )
    with h5py.File(path, "a") as file:
        file["version"] = 1
        file.create_group("meta")["text"] = "made on Monday"

    found, manifest, _ = built(path, tmp_path / "other", max_dropped=0.5)
    check(found, images)
    assert sum(manifest["dropped"].values()) == 2


ALL = ("feats", "bbox", "num_bbox", "widths", "heights", "img_ids")


def test_hdf5_with_a_dataset_for_each_field(tmp_path, images):
    path = published.columns(tmp_path / "x.h5", images, 9, ALL)
    check(built(path, tmp_path / "a")[0], images, "none")
    ids = {"objects_id": np.stack([published.padded(i["cls_id_1601"] - 1, 9) for i in images])}
    confidence = {"objects_conf": np.stack([published.padded(i["cls_conf"], 9) for i in images])}
    path = published.columns(tmp_path / "y.h5", images, 9, ALL, **ids, **confidence)
    check(built(path, tmp_path / "b")[0], images)

    with h5py.File(tmp_path / "z.h5", "w") as file:
        file["features"] = np.concatenate([image["features"] for image in images])
        file["boxes"] = np.concatenate([image["boxes"] for image in images])
        file["num_boxes"] = [len(image["boxes"]) for image in images]
        file["image_w"] = np.full((6, 1), 100)
        file["image_h"] = np.full((6, 1), 80)
        file["image_ids"] = [published.name_of(image) for image in images]

    check(built(tmp_path / "z.h5", tmp_path / "c")[0], images, "none")


def test_gqa_objects_in_several_files(tmp_path, images):
    """Check features and boxes in numbered files, and all else in one JSON for all of them."""
    info = {}
    for number, part in enumerate((images[:4], images[4:])):
        names = ("features", "bboxes", None, None, None, None)
        published.columns(tmp_path / f"gqa_objects_{number}.h5", part, 9, names)
        for row, image in enumerate(part):
            info[published.name_of(image)] = {
                **{"width": 100, "height": 80, "file": number, "idx": row},
                "objectsNum": len(image["boxes"]),
            }

    (tmp_path / "info.json").write_text(json.dumps(info))
    for number, part in enumerate((images[:4], images[4:])):
        path = tmp_path / f"gqa_objects_{number}.h5"
        found, _, how = built(path, tmp_path / f"store-{number}", image_ids=tmp_path / "info.json")
        check(found, part, "none")
        assert "no name" not in how


@pytest.mark.parametrize("form", ["fewer names", "blank names", "numbered", "beside"])
def test_spare_rows(tmp_path, images, form):
    spare = [{**images[0], "image_id": ""}, {**images[1], "image_id": ""}]
    names = [published.name_of(image) for image in images]
    ids = tmp_path / "ids.txt"
    all_names = (*ALL[:5], "image_ids" if form == "blank names" else None)
    path = published.columns(tmp_path / "x.h5", [*images, *spare], 9, all_names)
    if form == "fewer names":
        ids.write_text("\n".join(names))
    elif form == "numbered":
        ids = tmp_path / "ids.json"
        ids.write_text(json.dumps({name: row for row, name in enumerate(names)}))
    elif form == "beside":
        (tmp_path / "x_imgid2idx.pkl").write_bytes(
            pickle.dumps({name: row for row, name in enumerate(names)})
        )

    given = ids if ids.exists() else ""
    found, manifest, how = built(path, tmp_path / "store", image_ids=given)
    check(found, images, "none")
    assert "2 of 8 rows have no name and are left out" in how
    assert manifest["images_read"] == 6


def test_names_that_do_not_belong_to_the_rows(tmp_path, images):
    path = published.columns(tmp_path / "x.h5", images, 9, (*ALL[:5], None))
    ids = tmp_path / "ids.json"
    for names, message in (
        ([f"name-{number}" for number in range(7)], "names 7 images, but the features hold 6"),
        ({"a": 6}, "a is row 6, expected 0 to 5"),
        ({"a": 1, "b": 1}, "a and b are both row 1"),
        ({}, "none of its 6 rows has a name"),
    ):
        ids.write_text(json.dumps(names))
        assert message in refusal(path, image_ids=ids)


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
        path = published.columns(tmp_path / "x.h5", scaled, 9, ALL)
    else:
        scaled = [{**image, "boxes": box(image)} for image in images]
        path = published.mmf_lmdb(tmp_path / "x.lmdb", scaled)

    labels = {"npz": "top", "pickles": "dense"}.get(form, "none")
    found, _, how = built(path, tmp_path / "store")
    check(found, images, labels, tolerance=1e-3)
    assert "boxes are shares of the image, multiplied by its size" in how


def test_shares_as_corner_and_size(tmp_path, images):
    def corner_and_size(image):
        return published.shares(image, 6)[:, [0, 1, 4, 5]]

    path = published.tsv_of(tmp_path / "x.tsv", images, BOTTOM_UP, boxes=corner_and_size)
    found, _, _ = built(path, tmp_path / "store", box_format="xywh")
    check(found, images, "none", tolerance=1e-3)


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


@needs_shared
def test_vcr_finds_images_by_the_numbers_of_the_official_features(tmp_path):
    from megatron_interbert.data.corpus import Corpus
    from megatron_interbert.tasks.vcr.samples import VcrImages, numbers_of, read_questions

    place = FIELD / "vcr_numbered"
    corpora = []
    for kind in ("VCR_gt_resnet101", "VCR_resnet101"):
        built(place / f"{kind}_faster_rcnn_genome.lmdb", tmp_path / kind)
        corpora.append(Corpus([str(tmp_path / kind)]))

    stores = VcrImages(*corpora, 100)
    store = corpora[0].stores[0]
    for split, expected in (("train", ["0", "1"]), ("val", ["1000001", "1000002"])):
        found = read_questions(str(place / f"{split}.jsonl"), stores)
        assert not found.dropped
        assert [store.image_id(question.annotated) for question in found.items] == expected
        assert [store.image_id(question.detected) for question in found.items] == expected

    assert numbers_of("test-7") == ["2000007"]
    assert numbers_of("movie-7") == numbers_of("val-x") == []
