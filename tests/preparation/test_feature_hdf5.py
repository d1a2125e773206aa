"""Test HDF5 files of region features in every layout."""

import json
import pickle

import h5py
import numpy as np
import pytest

from megatron_interbert.errors import UsageError
from tests.preparation import published
from tests.preparation.formats import made_up_images
from tests.preparation.hostile import HOSTILE
from tests.preparation.reading_features import built, check, opened, refusal
from tests.shared import SHARED, needs_shared
from tests.tools.building import build


@pytest.fixture
def images():
    return made_up_images(6)


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


def test_groups_of_splits_and_what_is_no_image(tmp_path, images):
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

    found, manifest, _ = built(path, tmp_path / "other")
    check(found, images)
    assert not manifest["dropped"]


def test_hdf5_with_a_dataset_for_each_field(tmp_path, images):
    path = published.columns(tmp_path / "x.h5", images, 9, published.ALL)
    check(built(path, tmp_path / "a")[0], images, "none")
    ids = {"objects_id": np.stack([published.padded(i["cls_id_1601"] - 1, 9) for i in images])}
    confidence = {"objects_conf": np.stack([published.padded(i["cls_conf"], 9) for i in images])}
    path = published.columns(tmp_path / "y.h5", images, 9, published.ALL, **ids, **confidence)
    check(built(path, tmp_path / "b")[0], images)

    for name, size in (("hw", (80, 100)), ("image_sizes", (100, 80))):
        names = (*published.ALL[:3], None, None, "imgids")
        path = published.columns(tmp_path / f"{name}.h5", images, 9, names, **{name: [size] * 6})
        check(built(path, tmp_path / name)[0], images, "none")

    with h5py.File(tmp_path / "z.h5", "w") as file:
        file["features"] = np.concatenate([image["features"] for image in images])
        file["boxes"] = np.concatenate([image["boxes"] for image in images])
        file["num_boxes"] = [len(image["boxes"]) for image in images]
        file["image_w"] = np.full((6, 1), 100)
        file["image_h"] = np.full((6, 1), 80)
        file["image_ids"] = [published.name_of(image) for image in images]

    check(built(tmp_path / "z.h5", tmp_path / "c")[0], images, "none")


@pytest.mark.parametrize("form", ["bytes", "text of bytes", "numbers", "fixed"])
def test_names_in_the_file(tmp_path, images, form):
    """Check names as text of bytes, as numbers and of fixed width; and a name in a group."""
    names = [published.name_of(image) for image in images]
    if form == "numbers":
        names = [str(7 * row) for row in range(6)]
        for name, image in zip(names, images, strict=True):
            image["image_id"] = np.array(name)

    values = {
        "bytes": [name.encode() for name in names],
        "text of bytes": [str(name.encode()) for name in names],
        "numbers": [7.0 * row for row in range(6)],
        "fixed": np.array(names, "S30"),
    }[form]
    more = {"image_ids": values}
    path = published.columns(tmp_path / "x.h5", images, 9, (*published.ALL[:5], None), **more)
    check(built(path, tmp_path / "a")[0], images, "none")

    def fields(image):
        name = values[names.index(published.name_of(image))]
        return {**published.volta_fields(image), "img_id": name}

    places = {name: f"row {row}" for row, name in enumerate(names)}
    path = published.by_place(tmp_path / "y.h5", images, lambda i, f: f"{places[i]}/{f}", fields)
    check(built(path, tmp_path / "b")[0], images)


def test_padding_without_a_number_of_regions(tmp_path, images):
    """Check fixed rows of zeros at the end, which are no regions; and an image of nothing else."""
    names = ("features", "boxes", None, "image_w", "image_h", "ids")
    check(
        built(published.columns(tmp_path / "x.h5", images, 9, names), tmp_path / "a")[0],
        images,
        "none",
    )
    path = published.columns(tmp_path / "y.h5", images, 9, names)
    with h5py.File(path, "a") as file:
        file["features"][2] = 0
        file["boxes"][2] = 0

    found, manifest, _ = built(path, tmp_path / "b", max_dropped=0.2)
    check(found, [*images[:2], *images[3:]], "none")
    assert manifest["dropped"] == {"no regions": 1}


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
        assert "without a name" not in how


@pytest.mark.parametrize(
    "form", ["fewer names", "blank names", "zeros for names", "numbered", "beside"]
)
def test_spare_rows(tmp_path, images, form):
    spare = [{**images[0], "image_id": ""}, {**images[1], "image_id": ""}]
    names = [published.name_of(image) for image in images]
    ids = tmp_path / "ids.txt"
    all_names = (*published.ALL[:5], "image_ids" if form == "blank names" else None)
    more = {"ids": [*range(1, 7), 0, 0]} if form == "zeros for names" else {}
    path = published.columns(tmp_path / "x.h5", [*images, *spare], 9, all_names, **more)
    if more:
        for row, image in enumerate(images):
            image["image_id"] = np.array(str(row + 1))
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
    assert "2 rows without a name, of 8" in how
    assert manifest["images_read"] == 8
    assert manifest["dropped"] == {"row without a name": 2}


def test_names_that_do_not_belong_to_the_rows(tmp_path, images):
    path = published.columns(tmp_path / "x.h5", images, 9, (*published.ALL[:5], None))
    ids = tmp_path / "ids.json"
    for names, message in (
        ([f"name-{number}" for number in range(7)], "names 7 images, but the features hold 6"),
        ({"a": 6}, "a is row 6, expected 0 to 5"),
        ({"a": 1, "b": 1}, "a and b are both row 1"),
        ({}, "none of its 6 rows has a name"),
    ):
        ids.write_text(json.dumps(names))
        assert message in refusal(path, image_ids=ids)


@needs_shared
def test_the_command_says_how_it_reads_and_what_it_leaves_out(tmp_path):
    place = SHARED / "data" / "field" / "spare_rows"
    flags = ("--image-ids", place / "train36_imgid2idx.pkl", "--trust-pickle")
    flags += ("--captions", place / "c.json", "--workers", 1)
    store, out = build(tmp_path / "store", place / "train36.hdf5", *flags)
    assert (store.num_images, store.num_captions) == (4, 4)
    lines = out.splitlines()
    assert lines[0].startswith(f"{place / 'train36.hdf5'}: HDF5 with a dataset for each field; ")
    assert "boxes in pixels (xyxy); no classes" in lines[0]
    assert lines[1] == f"{place / 'train36.hdf5'}: 2 rows without a name, of 6: left out"


@pytest.mark.parametrize("feature", HOSTILE, ids=lambda feature: feature.__name__)
def test_groups_do_not_reach_out(tmp_path, images, feature):
    """Check what is refused in the root of a file inside a group too, and links for groups."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"the-root-password:" * 400)
    path = published.by_place(
        tmp_path / "x.h5", images, lambda i, f: f"{i}/{f}", published.volta_fields
    )
    with h5py.File(path, "r+") as file:
        feature(file["image-0"], "features", secret)

    with pytest.raises(
        UsageError, match=f"dataset 'image-0/features' {HOSTILE[feature]}"
    ) as refused:
        opened(path).facts()

    assert "\n" not in str(refused.value)


def test_links_are_no_images(tmp_path, images):
    path = published.by_place(
        tmp_path / "x.h5", images, lambda i, f: f"{i}/{f}", published.volta_fields
    )
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["again"] = h5py.ExternalLink(str(path), "/image-0")
        file["soft"] = h5py.SoftLink("/again")
        for name, value in published.volta_fields(images[1]).items():
            file[f"image-1/{name}"] = value

    check(built(tmp_path / "y.h5", tmp_path / "store")[0], [images[1]])
