"""Test tools/build_features.py on bad input, full disks and kills: clear messages, nothing
half-written, nothing valid lost.
"""

import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.build import build as run_build
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.fields import ReadOptions
from megatron_interbert.preparation.building.sources.opening import open_features
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from tests.campaigns.fuzzing import KINDS
from tests.corpus import VOCABULARY
from tests.launching import launch
from tests.preparation.formats import (
    encoded,
    lxmert_line,
    made_up_images,
    vilbert_lmdb,
    write_lmdb,
    write_npz,
)
from tests.shared import SHARED, needs_shared
from tests.tools.building import build, command, refused, tsv

DATA = SHARED / "data" / "region_features"


class Planted:
    """Create a file when unpickled by the ordinary unpickler."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_need_leave_and_never_run(tmp_path, images):
    lmdb = vilbert_lmdb(tmp_path / "a.lmdb", images, protocol=2)
    assert "its rows are pickles; give --trust-pickle" in refused(
        lmdb, "--output", tmp_path / "none"
    )
    planted = tmp_path / "planted"
    bad = write_lmdb(tmp_path / "b.lmdb", [(b"a", pickle.dumps({"image_id": Planted(planted)}))])
    assert "pickle with more than data" not in refused(
        lmdb, "--output", tmp_path / "none", "--format", "npz"
    )
    assert "names io.open" in refused(bad, "--trust-pickle", "--output", tmp_path / "none")
    npz = write_npz(tmp_path / "npz", images)
    np.savez(npz / "zz.npz", info=np.array(Planted(planted), dtype=object))
    _, out = build(tmp_path / "store", npz, "--trust-pickle")
    assert "dropped: 1 images, pickle with more than data in it" in out
    assert not planted.exists()


def test_wrong_caption_file_and_vocabulary_are_refused_before_anything_is_written(tmp_path, images):
    path = tsv(tmp_path / "x.tsv", images)
    assert "nope.json: no such file" in refused(
        path, "--captions", tmp_path / "nope.json", "--output", tmp_path / "a"
    )
    (tmp_path / "words.txt").write_text("a\nb\n")
    assert f"{tmp_path / 'words.txt'}: has no [PAD]" in refused(
        path, "--vocab-file", tmp_path / "words.txt", "--output", tmp_path / "a"
    )
    captions = tmp_path / "captions.jsonl"
    captions.write_text(
        "".join(
            json.dumps({"image_id": str(i["image_id"]), "caption": "a dog"}) + "\n" for i in images
        )
    )
    assert "hold no splits" in refused(
        path, "--captions", captions, "--split", "train", "--output", tmp_path / "a"
    )
    assert not list(tmp_path.glob("a*"))


def test_a_damaged_shard_of_a_store_costs_its_images_only(tmp_path, images):
    """Flip bits in a shard, which can make HDF5 loop for ever: it must not be opened."""
    store, _ = build(
        tmp_path / "store", write_npz(tmp_path / "npz", images), "--images-per-shard", 4
    )
    shard = tmp_path / "store" / "shard-00001.h5"
    data = bytearray(shard.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 400, 7):
        data[place] ^= 0x55

    shard.write_bytes(data)
    again, out = build(
        tmp_path / "again", tmp_path / "store", "--max-dropped", "0.5", "--workers", 1
    )
    assert "dropped: 4 images, shard is damaged (sha256 differs)" in out
    assert [again.image_id(i) for i in range(8)] == [
        store.image_id(i) for i in (*range(4), *range(8, 12))
    ]


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
    reported = [
        json.loads(line) for line in (tmp_path / "store" / "dropped.jsonl").read_text().splitlines()
    ]
    assert {r["reason"] for r in reported} >= {
        "wrong number of columns",
        "features hold NaN or infinity, or values beyond float16",
    }
    assert len(reported) == 4
    assert not (tmp_path / "store.partial").exists()


def test_records_of_odd_shapes_and_names_are_reported(tmp_path, images):
    """Check confidences of twelve bytes each, a single number as boxes, and a file name that is not
    UTF-8: each is reported in a line.
    """
    values = lxmert_line(images[1]).rstrip("\n").split("\t")
    values[4] = encoded(np.repeat(images[1]["cls_conf"], 3), np.float32)
    (tmp_path / "x.tsv").write_text(
        lxmert_line(images[0]) + "\t".join(values) + "\n" + lxmert_line(images[2])
    )
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
    assert "dropped: 1 images, image id is not valid text" in out


@pytest.mark.parametrize(
    ("kilobytes", "words", "file"),
    [(6, 1, "images.db"), (100, 1, "shard-00000.h5"), (1500, 2000, "tokens.h5")],
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, kilobytes, words, file):
    """Limit the size of files, so that the captions' table, a shard or the tokens fail; without the
    limit the same command completes the build.
    """
    path = tsv(tmp_path / "x.tsv", made_up_images(60, features=2048))
    (tmp_path / "captions.tsv").write_text(
        "".join(f"image-{i}\t{'a red cat ' * words}\n" for i in range(60))
    )
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
    code, out, err = launch(
        "bash", "-c", f"ulimit -f {kilobytes}; exec {' '.join(map(str, flags))}"
    )
    assert code == 2, out + err
    assert "Traceback" not in err
    assert "the same command resumes" in err
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
        plan = BuildPlan(
            [open_features(str(path), "auto", ReadOptions())],
            str(tmp_path / "store"),
            detector={"name": "x"},
        )

        def killed(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("megatron_interbert.files.os.rename", killed)
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
        (
            lambda npz, captions: [f.write_bytes(b"PK") for f in npz.glob("*.npz")],
            "not a readable npz",
        ),
        (lambda npz, captions: captions.write_text('{"image_id": 1}\n'), "without captions in it"),
        (lambda npz, captions: [f.unlink() for f in npz.glob("*.npz")], "neither manifest.json"),
        (
            lambda npz, captions: captions.write_text(
                captions.read_text().replace('"image_id": "', '"image_id": "x')
            ),
            "their image ids differ",
        ),
        (lambda npz, captions: captions.write_bytes(b"\xff\xfe"), "looks like UTF-16; convert it"),
    ],
)
def test_input_without_any_use_is_one_line_and_leaves_nothing(tmp_path, damage, message):
    npz = shutil.copytree(DATA / "npz", tmp_path / "npz", copy_function=shutil.copyfile)
    captions = tmp_path / "captions.jsonl"
    shutil.copyfile(DATA / "captions.jsonl", captions)
    damage(npz, captions)
    assert message in refused(npz, "--captions", captions, "--output", tmp_path / "store")
    assert not list(tmp_path.glob("store*"))


def test_unfinished_builds_are_not_mixed_up(tmp_path, images):
    path = tsv(tmp_path / "x.tsv", images)
    (tmp_path / "store.partial").mkdir()
    (tmp_path / "store.partial" / "thesis.txt").write_text("mine")
    assert "holds 'thesis.txt', which this command did not make" in refused(
        path, "--output", tmp_path / "store"
    )
    assert (tmp_path / "store.partial" / "thesis.txt").read_text() == "mine"
    (tmp_path / "store.partial" / "plan.json").write_text("{}")
    assert "nothing was removed" in refused(path, "--output", tmp_path / "store", "--restart")
    assert (tmp_path / "store.partial" / "thesis.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "store.partial")
    images[0]["features"][:] = np.nan
    images[1]["features"][:] = np.nan
    assert "--max-dropped" in refused(tsv(path, images), "--output", tmp_path / "store")
    assert "box_format" not in refused(path, "--output", tmp_path / "store")
    message = refused(path, "--output", tmp_path / "store", "--images-per-shard", 5)
    assert (
        "left by a build with other settings or inputs (images_per_shard, units differ)" in message
    )
    images[2]["features"][:] = np.nan
    assert "(source_files" in refused(tsv(path, images), "--output", tmp_path / "store"), (
        "a source that was changed meanwhile"
    )
    assert "--max-dropped" in refused(
        write_npz(tmp_path / "npz", images),
        "--output",
        tmp_path / "from-npz",
        "--max-dropped",
        0.01,
    )
    images[2]["features"][:] = 1
    shutil.rmtree(tmp_path / "npz")
    changed = refused(
        write_npz(tmp_path / "npz", images),
        "--output",
        tmp_path / "from-npz",
        "--max-dropped",
        0.01,
    )
    assert "(source_files differ)" in changed, "a file of a folder that was changed meanwhile"

    with pytest.raises(UsageError, match="an unfinished build"):
        RegionStoreWriter(
            tmp_path / "store", feature_dim=4, num_classes=3, detector={}, soft_labels="none"
        )

    tsv(path, images)
    store, _ = build(
        tmp_path / "store", path, "--images-per-shard", 5, "--restart", "--max-dropped", 1
    )
    assert store.num_images == 10
    assert len(store.shards) in (2, 3)


def test_killed_at_any_moment_the_same_command_goes_on():
    """Run the short form of `python -m tests.campaigns.builds --kills 50`."""
    code, out, err = launch(
        sys.executable, "-m", "tests.campaigns.builds", "--kills", 4, "--seed", 3
    )
    assert code == 0, out + err
    assert "builds compared" in out


def test_mutated_inputs_end_in_clear_errors():
    """Try 550 files of all kinds; for more, `python -m tests.campaigns.fuzzing --cases 20000`."""
    command = (sys.executable, "-m", "tests.campaigns.fuzzing")
    code, out, err = launch(*command, "--cases", 550, "--seed", 0)
    assert code == 0, out + err
    assert "550 mutated inputs: no crash, no hang, nothing half-written" in out
    assert "without words" not in out
    for kind in KINDS:
        assert f"{kind} used" in out, "too much damage tests nothing but the front door"
