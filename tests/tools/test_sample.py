"""Test the generated corpus: the same for a seed, labelled as generated, captions true of their
scenes; and an evaluation on it.
"""

import json
import re
import sys

import numpy as np
import pytest

from megatron_interbert.data.manifest import HARD_IMAGES
from megatron_interbert.data.pretraining import trainable_captions
from megatron_interbert.data.store import RegionStore
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256, own_name
from megatron_interbert.preparation.work_folder import refuse_strangers
from megatron_interbert.sample.detector import OURS
from tests.launching import ROOT, launch, losses, pretrain

FLAGS = ("--train-scenes", 60, "--test-scenes", 12)


def make(folder, *flags):
    code, out, err = launch(
        sys.executable, "tools/make_sample.py", "--output", folder, *FLAGS, *flags
    )
    assert code == 0, out + err
    return folder


def test_leftovers_of_killed_commands_do_not_count_as_somebody_elses(tmp_path):
    for name in (HARD_IMAGES, "queries.jsonl"):
        own_name(tmp_path / name).touch()
    refuse_strangers(tmp_path, OURS)

    (tmp_path / "notes.new").touch()
    with pytest.raises(UsageError, match=r"notes\.new"):
        refuse_strangers(tmp_path, OURS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sample") / "corpus")


def test_a_seed_decides_everything(corpus, tmp_path):
    same = make(tmp_path / "same")
    other = make(tmp_path / "other", "--seed", 1)

    def digest(folder):
        store = RegionStore(str(folder / "train"))
        return [store.caption(i) for i in range(store.num_captions)], store.read(
            5
        ).features.tobytes()

    assert digest(same) == digest(corpus)
    assert digest(other) != digest(corpus)


def test_it_is_labelled_and_complete(corpus):
    for split, scenes in (("train", 60), ("test", 12)):
        store = RegionStore(str(corpus / split))
        assert store.manifest["generated"] is True
        assert store.num_images == scenes
        assert set(store.languages()) == {"en", "zh"}
        tokenizer = CaptionTokenizer(str(corpus / split / "vocab.txt"))

        for i in range(store.num_captions):
            assert tokenizer.unknown not in tokenizer.encode(store.caption(i), 64).ids, (
                store.caption(i)
            )

    assert file_sha256(corpus / "train" / "vocab.txt") == file_sha256(corpus / "test" / "vocab.txt")


def test_captions_name_objects_that_are_there_with_overlapping_boxes(corpus):
    store = RegionStore(str(corpus / "train"))
    names = store.manifest["class_names"]
    overlapping = 0

    for caption in trainable_captions(store, "en"):
        regions = store.read(int(store.caption_image[caption]))
        there = {
            names[i]
            for i in regions.class_ids[
                np.arange(len(regions.class_ids)), regions.class_probs.argmax(1)
            ]
        }
        named = set(re.findall(r"[a-z]+", store.caption(int(caption)))) & set(names)
        assert named
        assert named <= there
        overlapping += len(there) < len(regions.features)
        assert (regions.class_probs.sum(1) <= 1 + 1e-5).all()

    assert overlapping > 40


def test_train_then_evaluate_then_start_from_its_weights(corpus, tmp_path):
    """Check that printed metrics match the result, and where result and page are written."""
    run = tmp_path / "run"
    flags = (
        "--data-path",
        corpus / "train",
        "--train-iters",
        3,
        "--micro-batch-size",
        8,
        "--data-partitions",
        4,
        "--log-interval",
        1,
    )

    code, out, err = launch(
        *pretrain(
            *flags,
            "--save",
            run,
            "--valid-data-path",
            corpus / "test",
            "--eval-interval",
            2,
            "--eval-iters",
            1,
        )
    )
    assert code == 0, out + err
    assert "valid step 2/3" in out
    assert list((run / "tensorboard").iterdir())
    command = (
        sys.executable,
        "-m",
        "megatron_interbert.evaluate",
        "retrieval",
        "--zero-shot",
        "--language",
        "en",
        "--load",
        run,
    )
    code, out, err = launch(*command, "--data-path", corpus / "test")
    assert code == 0, out + err
    result = json.loads((run / "evaluation" / "retrieval" / "result.json").read_text())
    assert (result["protocol"], result["images"], result["captions"]) == ("zero-shot", 12, 12)
    assert result["data"]["generated"]
    assert f"{result['metrics']['t2i_R@1']:.2f}" in out
    page = (run / "evaluation" / "retrieval" / "result.html").read_text()
    assert page.count("<section>") == 12
    assert "Generated scenes" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|url\(|@import""", page), (
        "no outside resources"
    )

    code, out, err = launch(
        *pretrain(*flags, "--save", tmp_path / "next", "--init-from", run, "--lr", "0")
    )
    assert code == 0, out + err
    assert sorted(losses(tmp_path / "next")) == [1, 2, 3]

    other = tmp_path / "vocab.txt"
    other.write_text((corpus / "test" / "vocab.txt").read_text().replace("kettle", "teapot"))
    code, _, err = launch(*command, "--data-path", corpus / "test", "--vocab-file", other)
    assert code == 2
    assert "not the vocabulary that" in err
    code, _, err = launch(sys.executable, "-m", "megatron_interbert.evaluate", "retrieva")
    assert code == 2
    assert "task 'retrieva' (did you mean 'retrieval'?), expected one of retrieval" in err


def test_launchers_are_executable():
    import os

    for name in ("pretrain.sh", "quickstart.sh"):
        assert os.access(ROOT / "launchers" / name, os.X_OK)
