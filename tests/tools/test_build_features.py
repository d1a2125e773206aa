"""Real regions from npz files to a store to a trained model that has learned them by heart, on two tensor-parallel ranks."""

import json
import shutil
import sys

import numpy as np
import pytest

from megatron_interbert.data.store import RegionStore
from tests.launching import deepspeed, launch, records
from tests.shared import SHARED, needs_shared

DATA = SHARED / "data"


def build(output, npz=DATA / "region_features" / "npz", captions=DATA / "region_features" / "captions.jsonl", *flags):
    vocabulary = DATA / "vocab" / "bert-base-uncased-vocab.txt"
    return launch(
        sys.executable, "tools/build_features.py", "--npz", npz, "--captions", captions, "--output", output,
        "--vocab-file", vocabulary, "--class-names", DATA / "vocab" / "objects_vocab.txt", *flags,
    )  # fmt: skip


@needs_shared
def test_real_regions_are_learned_by_heart(tmp_path):
    code, out, err = build(tmp_path / "real")
    assert code == 0, out + err
    assert "20 images (2 with whole class distributions), 0 without caption skipped, 59 captions, 14 boxes clipped" in out
    check_against_the_files(RegionStore(str(tmp_path / "real")))
    flags = (
        "--model", "tiny", "--data-path", tmp_path / "real", "--language", "en", "--tensor-model-parallel-size", 2,
        "--train-iters", 350, "--micro-batch-size", 32, "--data-partitions", 1, "--lr", "1.5e-3", "--no-dropout",
        "--log-interval", 25, "--save", tmp_path / "run",
    )  # fmt: skip
    code, out, err = launch(*deepspeed(2, *flags))
    assert code == 0, out + err
    figures = records(tmp_path / "run")
    first, last = figures[25], figures[350]
    for name in ("msm_loss", "mrm_loss", "itm_loss"):
        assert last[name] < 0.5 * first[name], name
    code, out, err = launch(sys.executable, "-m", "megatron_interbert.evaluate", "retrieval", "--load", tmp_path / "run",
                            "--data-path", tmp_path / "real", "--language", "en")  # fmt: skip
    assert code == 0, out + err
    result = json.loads((tmp_path / "run" / "evaluation" / "retrieval" / "result.json").read_text())
    assert result["metrics"]["text_to_image"]["R@1"] == 100.0, "each caption must find its image first"


def check_against_the_files(store):
    names = store.manifest["class_names"]
    assert len(names) == 1601
    for number in range(store.num_images):
        with np.load(DATA / "region_features" / "npz" / f"{store.image_id(number)}.npz", allow_pickle=False) as source:
            regions = store.read(number)
            np.testing.assert_allclose(regions.features, source["features"], rtol=1e-3, atol=1e-3)
            assert regions.boxes.min() >= 0
            assert (regions.boxes[:, [0, 2]] <= regions.size[0]).all()
            if "cls_prob" in source:
                np.testing.assert_array_equal(regions.class_ids[:, 0], source["cls_prob"].argmax(1))
            else:
                np.testing.assert_array_equal(regions.class_ids[:, 0], source["cls_id_1601"])
                np.testing.assert_allclose(regions.class_probs[:, 0], source["cls_conf"], rtol=1e-5)


@needs_shared
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda npz, captions: next(npz.glob("*.npz")).write_bytes(b"PK"), ": not a readable npz"),
        (lambda npz, captions: captions.write_text('{"image_id": 1}\n'), "line 1 is not a caption record"),
        (lambda npz, captions: [f.unlink() for f in npz.glob("*.npz")], "no .npz files there"),
        (lambda npz, captions: spoil(next(npz.glob("*.npz")), "features"), "features hold NaN"),
        (lambda npz, captions: spoil(next(npz.glob("*.npz")), "boxes", drop=True), "'boxes' is missing"),
        (
            lambda npz, captions: captions.write_text(captions.read_text().replace('"image_id": "', '"image_id": "x')),
            "image_id differs",
        ),
    ],
)
def test_bad_files_are_named_and_nothing_remains(tmp_path, damage, message):
    npz = shutil.copytree(DATA / "region_features" / "npz", tmp_path / "npz", copy_function=shutil.copyfile)
    captions = tmp_path / "captions.jsonl"
    shutil.copyfile(DATA / "region_features" / "captions.jsonl", captions)
    damage(npz, captions)
    code, out, err = build(tmp_path / "store", npz, captions)
    assert code == 2, out + err
    assert message in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert not list(tmp_path.glob("store*"))


def spoil(file, name, drop=False):
    with np.load(file) as data:
        fields = dict(data)
    if drop:
        fields.pop(name)
    else:
        fields[name] = np.full_like(fields[name], np.nan)
    np.savez(file, **fields)
