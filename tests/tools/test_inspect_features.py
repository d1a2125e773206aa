"""Test `tools/inspect_features.py` as users call it: report, page, JSON, exit codes, damaged
stores, slow layouts.
"""

import json
import re
import shutil
import sys

import h5py
import numpy as np
import pytest

from tests.corpus import write_store
from tests.launching import launch
from tests.preparation.test_inspection import DATA, WRONG, write_real
from tests.shared import needs_shared

NAMES = ["background", "cat", "dog", "car", "tree", "house", "bird", "bus", "boat", "cup", "bed"]


def inspect(*flags):
    code, out, err = launch(sys.executable, "tools/inspect_features.py", *flags)
    assert "Traceback" not in err, err
    return code, out, err


def rewrite(store, name, change, shard=0, **layout):
    """Replace a dataset of a shard, and update the shard's size in the manifest."""
    manifest = json.loads((store / "manifest.json").read_text())
    entry = manifest["shards"][shard]
    path = store / entry["file"]

    with h5py.File(path, "a") as file:
        values = file[name][:]
        del file[name]
        file.create_dataset(name, data=change(values), **layout)

    entry["bytes"] = path.stat().st_size
    (store / "manifest.json").write_text(json.dumps(manifest))


@needs_shared
def test_real_store_passes_with_a_page_of_photos(tmp_path):
    store = write_real(tmp_path / "real")
    code, out, err = inspect(
        store, "--image-folder", DATA / "images", "--verify-hashes", "--output", tmp_path / "look"
    )
    assert code == 0, out + err

    for line in (
        "20 images, 807 regions, 59 captions",
        "image_features    416 x 2048     float16  contiguous",
        "2 more shards, all of this layout",
        "regions per image               17 to 100, median 36",
        "  +0        61 fit,     13.3 by chance, z 13.8",
        "ok       class ids: class ids are right",
        "ok       box format: boxes are corners in pixels",
        "ok       hashes: every file",
        "ok       layout: contiguous and uncompressed: one image is one read (",
        "0 problems, 1 warning",
    ):
        assert line in out, line

    report = json.loads((tmp_path / "look" / "inspection.json").read_text())
    assert report["problems"] == 0
    assert report["counts"]["inspected"] == {
        "images": 20,
        "read": 20,
        "regions": 807,
        "captions": 59,
    }
    page = (tmp_path / "look" / "inspection.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 20
    assert page.count("<figure>") == 20
    assert "A calico cat steps through the window of a rusty old car." in page
    assert not re.search(r"(src|href)=\"?https?:|@import|url\(", page), "the page stands alone"
    assert sorted(p.name for p in (tmp_path / "look").iterdir()) == [
        "inspection.html",
        "inspection.json",
    ]


@needs_shared
def test_wrong_ids_and_boxes_fail_with_what_mends_them(tmp_path):
    store = write_real(tmp_path / "real", shift=-1, boxes=WRONG["corners as xywh"])
    code, out, _ = inspect(store, "--json", tmp_path / "report.json", "--examples", 2)
    assert code == 1, out
    assert "problem  box format: corners were read as x y w h" in out
    assert "> rebuild with --box-format xyxy" in out
    assert "problem  class ids: class ids look shifted by +1" in out
    assert "> rebuild with --class-ids background-none" in out
    assert out.strip().splitlines()[-2].startswith("2 problems")
    assert json.loads((tmp_path / "report.json").read_text())["class_shift"]["shift"] == 1
    page = (tmp_path / "real-inspection" / "inspection.html").read_text()
    assert page.count("<figure>") == 2
    assert not (tmp_path / "real-inspection" / "inspection.json").exists()


def test_the_generated_corpus_passes(tmp_path):
    code, out, err = launch(
        sys.executable,
        "tools/make_sample.py",
        "--output",
        tmp_path,
        "--train-scenes",
        200,
        "--test-scenes",
        2,
    )
    assert code == 0, out + err
    code, out, err = inspect(tmp_path / "train")
    assert code == 0, out + err
    assert "ok       class ids: class ids are right: names fit the captions best as they are" in out
    assert "ok       box format" in out
    assert "0 problems, 0 warnings" in out
    assert (
        "Generated scenes, not photographs."
        in (tmp_path / "train-inspection" / "inspection.html").read_text()
    )


def test_damage_is_listed_not_raised(tmp_path):
    store = write_store(tmp_path / "store", images=60, images_per_shard=30)

    def spoil(features):
        features[:, 0] = np.nan
        return features

    rewrite(store, "image_features", spoil)
    code, out, _ = inspect(store, "--verify-hashes")
    assert code == 1
    assert "problem  records: 30 of 60 images cannot be read" in out
    listed = re.findall(r"shard-00000.h5: image \d+ \(image-\d+\): features hold NaN", out)
    assert len(listed) == 20
    assert "and 10 more" in out
    assert "problem  hashes: the sha256 of 1 files differs from manifest.json" in out
    report = json.loads((tmp_path / "store-inspection" / "inspection.json").read_text())
    assert report["counts"]["inspected"]["read"] == 30
    assert [v["about"] for v in report["verdicts"] if v["level"] == "problem"] == [
        "records",
        "hashes",
    ]


def test_a_shard_that_is_no_hdf5_is_listed(tmp_path):
    store = write_store(tmp_path / "store", images=40, images_per_shard=20)
    shard = store / "shard-00001.h5"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    code, out, _ = inspect(store, "--max-images", 10)
    assert code == 1
    assert "problem  records: 5 of 10 images cannot be read" in out
    assert "problem  files: 1 of 2 shards cannot be opened" in out
    assert (tmp_path / "store-inspection" / "inspection.html").read_text().count("<figure>") == 5


def test_a_slow_layout_is_named_with_its_cost(tmp_path):
    store = write_store(tmp_path / "store", images=40, images_per_shard=20)
    rewrite(
        store,
        "image_features",
        lambda f: f.astype(np.float32),
        1,
        chunks=(64, 24),
        compression="gzip",
    )
    code, out, _ = inspect(store)
    assert code == 0
    assert "warning  layout: 1 of 2 shards are slow to read" in out
    assert "image_features is float32: converted to float16 at every read" in out
    assert re.search(
        r"image_features in chunks of 64 x 24, gzip: an image of \d regions decompresses \(gzip\)"
        r" about 1.1 chunks, ",
        out,
    )
    assert f"> interbert build-features {store} --output NEW" in out
    assert "           shard-00001.h5\n" in out


def test_names_from_a_file(tmp_path):
    store = write_store(tmp_path / "store")
    for names in (NAMES, NAMES[1:]):
        (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
        code, out, _ = inspect(store, "--class-names", tmp_path / "names.txt")
        assert code == 0, out
        assert re.search(r"classes: (\w+ \d+, )*cat \d+", out)

    assert "warning  class ids: not enough evidence" in out, (
        "the captions of this corpus are random"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["missing"], "no manifest.json there, expected a region store"),
        (["STORE", "--image-folder", "missing"], "--image-folder missing: no such folder"),
        (["STORE", "--class-names", "NAMES"], "3 lines, but the store has 11 classes"),
        (["STORE", "--class-names", "missing.txt"], "--class-names: cannot read missing.txt"),
        (["STORE", "--max-images", "0"], "--max-images is 0, expected 1 or more"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, flags, message):
    known = {"STORE": tmp_path / "store", "NAMES": tmp_path / "names.txt"}
    write_store(known["STORE"], images=4)
    known["NAMES"].write_text("cat\ndog\ncar\n")
    code, out, err = inspect(*[known.get(flag, flag) for flag in flags])
    assert code == 2, out + err
    assert message in err.strip().splitlines()[-1]
    assert not (tmp_path / "store-inspection").exists()


def test_texts_from_a_store_cannot_break_the_page(tmp_path):
    store = write_store(tmp_path / "store", class_names=[f"<b>{n}" for n in NAMES])
    code, _, _ = inspect(store)
    assert code == 0
    page = (tmp_path / "store-inspection" / "inspection.html").read_text()
    assert "<b>cat" not in page
    assert "&lt;b&gt;cat" in page


def test_running_again_replaces_the_page(tmp_path):
    store = write_store(tmp_path / "store")
    for examples in (3, 5):
        code, _, _ = inspect(store, "--examples", examples, "--output", tmp_path / "look")
        assert code == 0
        assert (tmp_path / "look" / "inspection.html").read_text().count("<figure>") == examples

    shutil.rmtree(tmp_path / "look")
