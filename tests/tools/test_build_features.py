"""tools/build_features.py: every format gives the same store, the traps of real files, kills, bad input."""

import hashlib
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest

from megatron_interbert.data.building.build import BuildPlan
from megatron_interbert.data.building.build import build as run_build
from megatron_interbert.data.building.sources.fields import ReadOptions
from megatron_interbert.data.building.sources.opening import open_source
from megatron_interbert.data.building.store_writer import RegionStoreWriter
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from tests.corpus import VOCABULARY
from tests.data.formats import (
    adaptive_hdf5,
    bottom_up_line,
    encoded,
    lxmert_line,
    made_up_images,
    npz_fields,
    real_images,
    tensorpack_lmdb,
    vilbert_lmdb,
    write_lmdb,
    write_npz,
)
from tests.launching import launch
from tests.shared import SHARED, needs_shared

DATA = SHARED / "data"
CLASSES = "image_id,image_w,image_h,num_boxes,boxes,features,objects_id,objects_conf"


def command(*flags):
    return (sys.executable, "tools/build_features.py", *flags)


def build(output, *flags):
    """Build and open; the output must not complain."""
    code, out, err = launch(*command(*flags, "--output", output))
    assert code == 0, out + err
    return RegionStore(str(output)), out


def refused(*flags):
    """The one line of a refusal."""
    code, out, err = launch(*command(*flags))
    assert code == 2, out + err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def content(folder):
    """Hashes of all files of a store."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def images():
    return made_up_images(12)


def tsv(path, images, line=lxmert_line):
    path.write_text("".join(map(line, images)))
    return path


@needs_shared
def test_ten_real_images_are_byte_equal_from_every_format(tmp_path):
    images = real_images()
    assert len(images) == 10
    captions = DATA / "region_features" / "captions.jsonl"
    (tmp_path / "six.tsv").write_text("".join(map(bottom_up_line, images)))
    (tmp_path / "eight.tsv").write_text("".join(bottom_up_line(image, classes=True) for image in images))
    sources = {
        "npz": (write_npz(tmp_path / "npz", images),),
        "lxmert": (DATA / "lxmert_tsv" / "train2014_obj36.tsv",),
        "lmdb": (vilbert_lmdb(tmp_path / "vilbert.lmdb", images), "--trust-pickle"),
        "six": (tmp_path / "six.tsv",),
        "eight": (tmp_path / "eight.tsv", "--columns", CLASSES),
    }
    stores = {name: build(tmp_path / name / "store", *flags, "--captions", captions)[0] for name, flags in sources.items()}
    expected = {r.image_id: r for r in map(stores["npz"].read, range(10))}
    for name, store in stores.items():
        assert store.num_images == 10
        for got in map(store.read, range(10)):
            for field in ("features", "boxes") if name == "six" else ("features", "boxes", "class_ids", "class_probs"):
                assert getattr(got, field).tobytes() == getattr(expected[got.image_id], field).tobytes(), (name, field)
    assert stores["six"].manifest["soft_labels"] == "none", "six columns hold no labels"
    assert stores["lxmert"].manifest["soft_labels"] == "top_1_confidence"


@needs_shared
def test_all_real_images(tmp_path):
    """20 images, two of them with whole distributions; boxes up to 69 pixels outside are clipped and counted."""
    flags = ("--captions", DATA / "region_features" / "captions.jsonl", "--class-names", DATA / "vocab" / "objects_vocab.txt",
             "--vocab-file", DATA / "vocab" / "bert-base-uncased-vocab.txt")  # fmt: skip
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
    """The trap: id 0 of the TSV is the first word of the vocabulary, class 1 of the store. Told wrongly, the labels differ."""
    line = (DATA / "lxmert_tsv" / "train2014_obj36.tsv").read_text().splitlines()[0].split("\t")
    import base64

    ids = np.frombuffer(base64.b64decode(line[3]), np.int64)
    right, _ = build(tmp_path / "right", DATA / "lxmert_tsv" / "train2014_obj36.tsv")
    wrong, _ = build(tmp_path / "wrong", DATA / "lxmert_tsv" / "train2014_obj36.tsv", "--class-ids", "background-first")
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
    assert "they look like x, y, width, height: --box-format xywh" in out


def test_lmdb_rows_of_pretraining_carry_their_captions(tmp_path, images):
    captions = [f"caption  number {number}" for number in range(12)]
    store, _ = build(tmp_path / "store", tensorpack_lmdb(tmp_path / "rows.lmdb", images, captions))
    assert [store.caption(i) for i in range(12)] == [f"caption number {number}" for number in range(12)]
    assert store.manifest["soft_labels"] == "dense"
    for number, image in enumerate(images):
        np.testing.assert_array_equal(store.read(number).class_ids[:, 0], image["cls_id_1601"])
        np.testing.assert_array_equal(store.read(number).features, image["features"].astype(np.float16))


def test_adaptive_hdf5_finds_sizes_and_names(tmp_path, images):
    names = adaptive_hdf5(tmp_path / "adaptive.hdf5", images)
    (tmp_path / "ids.pkl").write_bytes(pickle.dumps({name: row for row, name in enumerate(names)}))
    assert "give the file that does by --image-ids" in refused(tmp_path / "adaptive.hdf5", "--output", tmp_path / "none")
    flags = (tmp_path / "adaptive.hdf5", "--image-ids", tmp_path / "ids.pkl")
    (tmp_path / "number.pkl").write_bytes(pickle.dumps(12))
    message = refused(
        tmp_path / "adaptive.hdf5", "--image-ids", tmp_path / "number.pkl", "--trust-pickle", "--output", tmp_path / "no"
    )
    assert "holds one int, expected a list of names" in message
    (tmp_path / "ids.txt").write_text("".join(f"photo {row} of {name}.jpg\n" for row, name in enumerate(names)))
    blanks, _ = build(tmp_path / "blanks", tmp_path / "adaptive.hdf5", "--image-ids", tmp_path / "ids.txt")
    assert blanks.image_id(3) == f"photo 3 of {names[3]}.jpg"
    assert "is a pickle; give --trust-pickle" in refused(*flags, "--output", tmp_path / "none")
    store, _ = build(tmp_path / "store", *flags, "--trust-pickle")
    for number, image in enumerate(images):
        got = store.read(number)
        assert got.image_id == image["image_id"]
        assert got.size == (100.0, 80.0)
        np.testing.assert_allclose(got.boxes, image["boxes"].clip(0, [100, 80, 100, 80]), atol=1e-5)
    assert store.manifest["soft_labels"] == "none"


class Planted:
    """Its pickle would make a file when loaded by the ordinary unpickler."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_need_leave_and_never_run(tmp_path, images):
    lmdb = vilbert_lmdb(tmp_path / "a.lmdb", images, protocol=2)
    assert "its rows are pickles; give --trust-pickle" in refused(lmdb, "--output", tmp_path / "none")
    planted = tmp_path / "planted"
    bad = write_lmdb(tmp_path / "b.lmdb", [(b"a", pickle.dumps({"image_id": Planted(planted)}))])
    assert "pickle with more than data" not in refused(lmdb, "--output", tmp_path / "none", "--format", "npz")
    assert "names io.open" in refused(bad, "--trust-pickle", "--output", tmp_path / "none")
    npz = write_npz(tmp_path / "npz", images)
    np.savez(npz / "zz.npz", info=np.array(Planted(planted), dtype=object))
    _, out = build(tmp_path / "store", npz, "--trust-pickle")
    assert "dropped: 1 images, pickle with more than data in it" in out
    assert not planted.exists()


def test_labels_in_a_pickle_are_not_lost_in_silence(tmp_path, images):
    """The npz files of bottom-up-attention.pytorch: x, bbox, and everything else in a pickled `info`."""
    (tmp_path / "npz").mkdir()
    for image in images:
        info = {"objects": image["cls_id_1601"] - 1, "objects_conf": image["cls_conf"]}
        fields = {"x": image["features"], "bbox": image["boxes"], "image_w": image["image_w"], "image_h": image["image_h"]}
        np.savez(tmp_path / "npz" / f"{image['image_id']}.npz", **fields, info=np.array(info, dtype=object))
    assert "its classes may be in a pickle and --trust-pickle was not given" in refused(
        tmp_path / "npz", "--output", tmp_path / "a"
    )
    store, out = build(tmp_path / "b", tmp_path / "npz", "--trust-pickle")
    assert "12 images (labels: 12 top_1_confidence)" in out
    by_id = {str(image["image_id"]): image for image in images}
    for number in range(12):
        np.testing.assert_array_equal(store.read(number).class_ids[:, 0], by_id[store.image_id(number)]["cls_id_1601"])


def test_wrong_caption_file_and_vocabulary_are_refused_before_anything_is_written(tmp_path, images):
    path = tsv(tmp_path / "x.tsv", images)
    assert "nope.json: no such file" in refused(path, "--captions", tmp_path / "nope.json", "--output", tmp_path / "a")
    (tmp_path / "words.txt").write_text("a\nb\n")
    assert f"{tmp_path / 'words.txt'}: no [PAD] in it" in refused(
        path, "--vocab-file", tmp_path / "words.txt", "--output", tmp_path / "a"
    )
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"image_id": str(i["image_id"]), "caption": "a dog"}) + "\n" for i in images))
    assert "hold no splits" in refused(path, "--captions", captions, "--split", "train", "--output", tmp_path / "a")
    assert not list(tmp_path.glob("a*"))


def test_one_image_under_two_spellings_of_its_name_comes_once(tmp_path, images):
    """Both would get the same captions; without captions nothing is known of the spelling, and both stay."""
    images[3]["image_id"], images[7]["image_id"] = "000000000042", "COCO_val2014_000000000042.jpg"
    path = tsv(tmp_path / "x.tsv", images)
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"image_id": str(i["image_id"]), "caption": "a dog"}) + "\n" for i in images))
    store, out = build(tmp_path / "with", path, "--captions", captions)
    assert "dropped: 1 images, image id seen before" in out
    assert [store.image_id(i) for i in range(store.num_images)].count("000000000042") == 1
    assert build(tmp_path / "without", path)[0].num_images == 12


def test_stores_are_joined_cut_anew_and_taken_apart(tmp_path, images):
    first, _ = build(tmp_path / "first", write_npz(tmp_path / "a", images[:7]), "--images-per-shard", 3)
    second, _ = build(tmp_path / "second", write_npz(tmp_path / "b", images[5:]), "--images-per-shard", 2)
    assert (len(first.shards), len(second.shards)) == (3, 4)
    both, out = build(tmp_path / "both", tmp_path / "first", tmp_path / "second", "--images-per-shard", 4)
    in_folders = sorted(images[:7], key=lambda image: str(image["image_id"])) + sorted(
        images[7:], key=lambda image: str(image["image_id"])
    )
    assert [both.image_id(i) for i in range(12)] == [str(image["image_id"]) for image in in_folders]
    assert "dropped: 2 images, image id seen before" in out
    assert both.manifest["images_by_label_kind"] == {"top_1_confidence": 12}
    assert both.manifest["soft_labels"] == "top_1_confidence"
    direct, _ = build(tmp_path / "direct", tsv(tmp_path / "all.tsv", in_folders))
    for number in range(12):
        for field in ("features", "boxes", "class_ids", "class_probs"):
            assert getattr(both.read(number), field).tobytes() == getattr(direct.read(number), field).tobytes()
    (tmp_path / "keep.txt").write_text("image-3\nimage-8.jpg\nnone\n")
    part, _ = build(tmp_path / "part", tmp_path / "both", "--only", tmp_path / "keep.txt")
    assert [part.image_id(i) for i in range(part.num_images)] == ["image-3", "image-8"]
    build(tmp_path / "other", tmp_path / "a", "--detector", "another")
    stores = tmp_path / "first", tmp_path / "other"
    assert "--allow-other-detector" in refused(*stores, "--output", tmp_path / "none")
    assert "a region store knows its own" in refused(stores[0], "--detector", "a third", "--output", tmp_path / "none")
    mixed, _ = build(tmp_path / "mixed", *stores, "--allow-other-detector")
    assert mixed.manifest["detector"] == {
        **first.manifest["detector"],
        "joined_with": [{"name": "another", "revision": ""}],
    }


def test_a_damaged_shard_of_a_store_costs_its_images_only(tmp_path, images):
    """Bits flipped where HDF5 keeps strings can make it loop for ever: the shard is not opened."""
    store, _ = build(tmp_path / "store", write_npz(tmp_path / "npz", images), "--images-per-shard", 4)
    shard = tmp_path / "store" / "shard-00001.h5"
    data = bytearray(shard.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 400, 7):
        data[place] ^= 0x55
    shard.write_bytes(data)
    again, out = build(tmp_path / "again", tmp_path / "store", "--max-dropped", "0.5", "--workers", 1)
    assert "dropped: 4 images, shard is damaged (sha256 differs)" in out
    assert [again.image_id(i) for i in range(8)] == [store.image_id(i) for i in (*range(4), *range(8, 12))]


def test_a_header_does_not_decide_the_size_of_shards(tmp_path, images):
    names = "\t".join(
        ["img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes", "features"]
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


def test_bad_records_are_reported_and_the_others_kept(tmp_path, images):
    lines = [lxmert_line(image) for image in images]
    lines[2] = lines[2].replace("\t", " ", 3)
    lines[4] = lines[4][:-40] + "\n"
    images[6]["features"][0, 0] = np.nan
    lines[6] = lxmert_line(images[6])
    lines[8] = lines[8].replace("\t", "\t!", 3)
    (tmp_path / "x.tsv").write_text("".join(lines))
    message = refused(tmp_path / "x.tsv", "--output", tmp_path / "store")
    assert "4 of 12 images cannot be used" in message
    assert "--max-dropped" in message
    store, _ = build(tmp_path / "store", tmp_path / "x.tsv", "--max-dropped", "0.5")
    assert store.num_images == 8
    reported = [json.loads(line) for line in (tmp_path / "store" / "dropped.jsonl").read_text().splitlines()]
    assert {r["reason"] for r in reported} >= {"wrong number of columns", "features hold NaN or infinity, or values beyond float16"}
    assert len(reported) == 4
    assert not (tmp_path / "store.partial").exists()


def test_records_of_odd_shapes_and_names_are_reported(tmp_path, images):
    """Confidences in float64, boxes that are one number, a file name that is no UTF-8: a report line each."""
    values = lxmert_line(images[1]).rstrip("\n").split("\t")
    values[4] = encoded(images[1]["cls_conf"], np.float64)
    (tmp_path / "x.tsv").write_text(lxmert_line(images[0]) + "\t".join(values) + "\n" + lxmert_line(images[2]))
    store, out = build(tmp_path / "a", tmp_path / "x.tsv", "--max-dropped", 1)
    assert store.num_images == 2
    assert "class confidences do not fit" in out
    folder = write_npz(tmp_path / "npz", images)
    np.savez(folder / "image-3.npz", **{**images[3], "boxes": np.array(5.0)})
    nameless = {name: value for name, value in images[4].items() if name != "image_id"}
    with open(os.fsencode(folder) + b"/\xc4\xe3.npz", "wb") as handle:
        np.savez(handle, **nameless)
    store, out = build(tmp_path / "b", folder, "--max-dropped", 1)
    assert store.num_images == 11
    assert "dropped: 1 images, image id is no text" in out


@pytest.mark.parametrize(
    ("kilobytes", "words", "file"), [(6, 1, "images.db"), (100, 1, "shard-00000.h5"), (1500, 2000, "tokens.h5")]
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, kilobytes, words, file):
    """A limit on the size of files meets the table of captions, a shard, or the tokens; without it the build ends well."""
    path = tsv(tmp_path / "x.tsv", made_up_images(60, features=2048))
    (tmp_path / "captions.tsv").write_text("".join(f"image-{i}\t{'a red cat ' * words}\n" for i in range(60)))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    more = (
        "--captions",
        tmp_path / "captions.tsv",
        "--vocab-file",
        tmp_path / "vocab.txt",
        "--workers",
        1,
        "--images-per-shard",
        15,
    )
    flags = command(path, *more, "--output", tmp_path / "store")
    code, out, err = launch("bash", "-c", f"ulimit -f {kilobytes}; exec {' '.join(map(str, flags))}")
    assert code == 2, out + err
    assert "Traceback" not in err
    assert "the same command goes on" in err
    left = {path.name for path in (tmp_path / "store.partial").glob("*")}
    assert not any(name.endswith(".new") for name in left)
    assert ("shard-00003.h5" in left) == (file == "tokens.h5"), left
    assert build(tmp_path / "store", path, *more)[0].num_captions == 60


@pytest.mark.parametrize("stage", ["plan.json.99.new", "all but the last rename"])
def test_left_by_a_kill_at_the_very_start_or_end(tmp_path, images, monkeypatch, stage):
    path = tsv(tmp_path / "x.tsv", images)
    work = tmp_path / "store.partial"
    if stage == "plan.json.99.new":
        work.mkdir()
        (work / stage).write_text("{")
    else:
        plan = BuildPlan([open_source(str(path), "auto", ReadOptions())], str(tmp_path / "store"), detector={"name": "x"})

        def killed(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("megatron_interbert.data.building.build.os.rename", killed)
            with pytest.raises(KeyboardInterrupt):
                run_build(plan)
        assert (work / "manifest.json").exists()
        assert run_build(plan)["counts"]["images"] == 12
        return
    assert build(tmp_path / "store", path)[0].num_images == 12


@needs_shared
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda npz, captions: [f.write_bytes(b"PK") for f in npz.glob("*.npz")], "not a readable npz"),
        (lambda npz, captions: captions.write_text('{"image_id": 1}\n'), "is not a caption record"),
        (lambda npz, captions: [f.unlink() for f in npz.glob("*.npz")], "neither manifest.json"),
        (
            lambda npz, captions: captions.write_text(captions.read_text().replace('"image_id": "', '"image_id": "x')),
            "image_id differs",
        ),
        (lambda npz, captions: captions.write_bytes(b"\xff\xfe"), "cannot be read as UTF-8"),
    ],
)
def test_input_without_any_use_is_one_line_and_leaves_nothing(tmp_path, damage, message):
    npz = shutil.copytree(DATA / "region_features" / "npz", tmp_path / "npz", copy_function=shutil.copyfile)
    captions = tmp_path / "captions.jsonl"
    shutil.copyfile(DATA / "region_features" / "captions.jsonl", captions)
    damage(npz, captions)
    assert message in refused(npz, "--captions", captions, "--output", tmp_path / "store")
    assert not list(tmp_path.glob("store*"))


def test_unfinished_builds_are_not_mixed_up(tmp_path, images):
    path = tsv(tmp_path / "x.tsv", images)
    (tmp_path / "store.partial").mkdir()
    (tmp_path / "store.partial" / "thesis.txt").write_text("mine")
    assert "is no unfinished build" in refused(path, "--output", tmp_path / "store")
    assert (tmp_path / "store.partial" / "thesis.txt").read_text() == "mine"
    assert "is no unfinished build" in refused(path, "--output", tmp_path / "store", "--restart")
    assert (tmp_path / "store.partial" / "thesis.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "store.partial")
    images[0]["features"][:] = np.nan
    images[1]["features"][:] = np.nan
    assert "--max-dropped" in refused(tsv(path, images), "--output", tmp_path / "store")
    assert "box_format" not in refused(path, "--output", tmp_path / "store")
    message = refused(path, "--output", tmp_path / "store", "--images-per-shard", 5)
    assert "left by a build with other settings (images_per_shard, units differ)" in message
    images[2]["features"][:] = np.nan
    assert "(source_files" in refused(tsv(path, images), "--output", tmp_path / "store"), "a source that was changed meanwhile"
    assert "--max-dropped" in refused(write_npz(tmp_path / "npz", images), "--output", tmp_path / "from-npz", "--max-dropped", 0.01)
    images[2]["features"][:] = 1
    shutil.rmtree(tmp_path / "npz")
    changed = refused(write_npz(tmp_path / "npz", images), "--output", tmp_path / "from-npz", "--max-dropped", 0.01)
    assert "(source_files differ)" in changed, "a file of a folder that was changed meanwhile"
    with pytest.raises(UsageError, match="an unfinished build"):
        RegionStoreWriter(tmp_path / "store", feature_dim=4, num_classes=3, detector={}, soft_labels="none")
    tsv(path, images)
    store, _ = build(tmp_path / "store", path, "--images-per-shard", 5, "--restart", "--max-dropped", 1)
    assert store.num_images == 10
    assert len(store.shards) in (2, 3)


def test_killed_at_any_moment_the_same_command_goes_on():
    """The short form of tests/campaigns/builds.py --kills 50."""
    code, out, err = launch(sys.executable, "tests/campaigns/builds.py", "--kills", 6, "--seed", 3)
    assert code == 0, out + err
    assert "builds compared" in out


def test_mutated_inputs_end_in_clear_errors():
    """1,050 files of seven kinds; more: tests/campaigns/fuzzing.py --cases 20000."""
    code, out, err = launch(sys.executable, "tests/campaigns/fuzzing.py", "--cases", 1050, "--seed", 0)
    assert code == 0, out + err
    assert "1050 mutated inputs: no crash, no hang, nothing half-written" in out
    assert "without words" not in out
    for kind in ("tsv", "json", "npz", "hdf5", "lmdb", "manifest", "shard"):
        assert f"{kind} used" in out, "too much damage tests nothing but the front door"
