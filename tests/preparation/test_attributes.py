"""Test attributes of regions: read from published files, kept when stores are built again, left out
where they cannot be used, and refused in pretraining on stores that lack them.
"""

import json

import h5py
import numpy as np
import pytest

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.region_batch import read_regions
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from tests.corpus import write_store
from tests.launching import launch, pretrain
from tests.preparation import published
from tests.preparation.formats import encoded, made_up_images
from tests.tools.building import build

LXMERT = (
    *("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf"),
    *("num_boxes", "boxes", "features"),
)
IMAGES = 6


@pytest.fixture
def images():
    """Make the regions of a few images."""
    return made_up_images(IMAGES)


def attributes_of(image, most=400):
    """Return attributes and confidences for an image, the same at each call."""
    random = np.random.default_rng(list(published.name_of(image).encode()))
    count = len(image["boxes"])
    return random.integers(0, most, count), random.uniform(size=count).astype(np.float32)


def lxmert(path, images, most=400):
    """Write LXMERT's TSV with attributes."""
    published.tsv_of(path, images, LXMERT)
    lines = []
    for line, image in zip(path.read_text().splitlines(), images, strict=True):
        values = line.split("\t")
        ids, confidence = attributes_of(image, most)
        values[LXMERT.index("attrs_id")] = encoded(ids, np.int64)
        values[LXMERT.index("attrs_conf")] = encoded(confidence, np.float32)
        lines.append("\t".join(values) + "\n")

    path.write_text("".join(lines))
    return path


def check(store, images):
    """Assert that a store has the attributes of the images."""
    assert store.num_attributes == 400
    names = [store.image_id(number) for number in range(store.num_images)]
    for image in images:
        number = names.index(published.name_of(image))
        found = store.read(number)
        ids, confidence = attributes_of(image)
        np.testing.assert_array_equal(found.attribute_ids[:, 0], ids)
        np.testing.assert_allclose(found.attribute_probs[:, 0], confidence, rtol=1e-6)


def test_lxmert_and_what_is_built_from_it(tmp_path, images):
    store, out = build(tmp_path / "a", lxmert(tmp_path / "x.tsv", images))
    assert "one of 400 attributes each" in out
    check(store, images)

    again, _ = build(tmp_path / "again", tmp_path / "a", "--images-per-shard", 2)
    check(again, images)
    (tmp_path / "keep.txt").write_text(f"{published.name_of(images[1])}\n")
    few, _ = build(tmp_path / "few", tmp_path / "a", "--only", tmp_path / "keep.txt")
    check(few, images[1:2])


@pytest.mark.parametrize("short", [False, True])
def test_volta_and_vl_t5(tmp_path, images, short):
    fields = published.short_fields if short else published.volta_fields

    def with_attributes(image):
        ids, confidence = attributes_of(image)
        name = "attr" if short else "attrs"
        return {**fields(image), f"{name}_id": ids, f"{name}_conf": confidence}

    path = published.by_place(
        tmp_path / "x.h5", images, lambda image, field: f"{image}/{field}", with_attributes
    )
    store, _ = build(tmp_path / "a", path)
    check(store, images)


def test_objects_with_attributes_in_json(tmp_path, images):
    lines = []
    for image in images:
        ids, confidence = attributes_of(image)
        objects = [
            {
                "rect": box.tolist(),
                "feature": encoded(feature, np.float32),
                "attr_id": int(one),
                "attr_conf": float(sure),
            }
            for box, feature, one, sure in zip(
                image["boxes"], image["features"], ids, confidence, strict=True
            )
        ]
        size = {"image_w": int(image["image_w"]), "image_h": int(image["image_h"])}
        record = json.dumps({"objects": objects, **size})
        lines.append(f"{published.name_of(image)}\t{record}\n")

    (tmp_path / "x.tsv").write_text("".join(lines))
    store, _ = build(tmp_path / "a", tmp_path / "x.tsv")
    check(store, images)


def test_joined_with_regions_that_have_none(tmp_path, images):
    lxmert(tmp_path / "x.tsv", images[:3])
    published.tsv_of(tmp_path / "y.tsv", images[3:], LXMERT[:5] + LXMERT[7:], header=True)
    store, _ = build(tmp_path / "a", tmp_path / "x.tsv", tmp_path / "y.tsv")
    check(store, images[:3])
    names = [store.image_id(number) for number in range(store.num_images)]
    for image in images[3:]:
        found = store.read(names.index(published.name_of(image)))
        assert not found.attribute_probs.any()

    plain, _ = build(tmp_path / "b", tmp_path / "y.tsv")
    assert plain.num_attributes == 0
    assert plain.read(0).attribute_ids is None
    with h5py.File(tmp_path / "b" / "shard-00000.h5") as file:
        assert "attribute_ids" not in file


def test_attributes_beyond_their_number(tmp_path, images):
    path = lxmert(tmp_path / "x.tsv", images, most=1600)
    store, out = build(tmp_path / "a", path)
    assert "attributes are left out (attribute ids beyond the attributes" in out
    assert "see --num-attributes" in out
    assert store.num_images == IMAGES
    assert store.num_attributes == 0

    more, out = build(tmp_path / "b", path, "--num-attributes", 1600)
    assert "one of 1600 attributes each" in out
    ids, _ = attributes_of(images[0], 1600)
    names = [more.image_id(number) for number in range(more.num_images)]
    found = more.read(names.index(published.name_of(images[0])))
    np.testing.assert_array_equal(found.attribute_ids[:, 0], ids)


def test_a_record_whose_attributes_do_not_fit_is_dropped(tmp_path, images):
    path = lxmert(tmp_path / "x.tsv", images)
    lines = path.read_text().splitlines()
    values = lines[2].split("\t")
    values[LXMERT.index("attrs_id")] = encoded(np.zeros(1), np.int64)
    lines[2] = "\t".join(values)
    path.write_text("\n".join(lines) + "\n")
    store, _ = build(tmp_path / "a", path, "--max-dropped", 0.5)
    assert store.num_images == IMAGES - 1
    assert store.manifest["dropped"] == {"attributes do not fit the number of boxes": 1}
    check(store, [*images[:2], *images[3:]])


def test_stores_that_pretraining_on_attributes_refuses(tmp_path):
    plain = write_store(tmp_path / "plain", images=8)
    flags = ("--model", "tiny", "--train-iters", 1, "--objectives", "msm,attributes,itm")
    code, _, err = launch(*pretrain(*flags, "--data-path", plain))
    assert code == 2
    assert "not all of its regions have attributes" in err

    write_store(tmp_path / "six", images=8, num_attributes=6)
    write_store(tmp_path / "seven", images=8, num_attributes=7)
    with pytest.raises(UsageError, match=r"7 attributes of regions, but .* has 6"):
        Corpus([str(tmp_path / "six"), str(tmp_path / "seven")])
    both = Corpus([str(tmp_path / "six"), str(plain)])
    assert both.num_attributes == 0


def test_damaged_attributes_are_named(tmp_path):
    store = write_store(tmp_path / "store", images=8, num_attributes=6)
    with h5py.File(store / "shard-00000.h5", "r+") as file:
        file["attribute_ids"][5] = 6

    corpus = Corpus([str(store)])
    with pytest.raises(UsageError, match="attributes beyond their number; ids 0 to 6"):
        read_regions(corpus, np.arange(8), 99, attributes=True)
    read_regions(corpus, np.arange(8), 99)

    with h5py.File(store / "shard-00000.h5", "r+") as file:
        del file["attribute_probs"]
    with pytest.raises(UsageError, match="'attribute_probs' is missing"):
        RegionStore(str(store)).read(0)
