"""Test retrieval among listed images and over folds, against brute force."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.retrieval import evaluation
from megatron_interbert.tasks.retrieval.config import EvaluateRetrievalConfig
from megatron_interbert.tasks.retrieval.evaluation import evaluate_retrieval
from megatron_interbert.tasks.retrieval.job import retrieval_metrics
from megatron_interbert.tasks.retrieval.tiles import ScoreTiles
from tests.corpus import write_store
from tests.tasks.test_retrieval import CPU, make, one_by_one, open_pairs, sizes


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Write a store of 14 images with captions."""
    return write_store(tmp_path_factory.mktemp("store") / "s", images=14)


def evaluated(store, output, **more):
    """Run `evaluate retrieval` in this process; return its result."""
    config = EvaluateRetrievalConfig(
        load="a run", data_path=str(store), output=str(output), precision="fp32", **more
    )
    config.check()
    return evaluate_retrieval(config, ParallelState(), CPU)


def recalls_of(scores, pairs, images):
    """Compute recall among some images by brute force, from the scores of all pairs."""
    own = pairs.own_image()
    rows = np.flatnonzero(np.isin(own, images))
    part = scores[np.ix_(rows, images)]
    found = retrieval_metrics(part, np.searchsorted(images, own[rows]))
    return [found["text_to_image"]["R@1"], found["image_to_text"]["R@5"]]


def test_listed_images_and_folds_against_brute_force(store, tmp_path, monkeypatch):
    model = make(sizes())
    pairs = open_pairs(store)
    scores = one_by_one(model, pairs)
    source = SimpleNamespace(
        facts={"files": {"a": "1"}}, config=sizes(), kind="checkpoint", path=tmp_path / "run" / "a"
    )
    monkeypatch.setattr(evaluation, "load_model", lambda *flags: (model, source))
    ids = [pairs.corpus.stores[0].image_id(image) for image in range(14)]

    (tmp_path / "some.txt").write_text("\n".join(ids[3:9]) + "\n")
    result = evaluated(store, tmp_path / "a", images=str(tmp_path / "some.txt"))
    expected = recalls_of(scores, pairs, np.arange(3, 9))
    assert [result["metrics"][n] for n in ("t2i_R@1", "i2t_R@5")] == pytest.approx(expected)
    assert (result["images"], result["folds"]) == (6, 1)

    result = evaluated(store, tmp_path / "b", folds=3)
    parts = np.array_split(np.arange(14), 3)
    expected = np.mean([recalls_of(scores, pairs, part) for part in parts], axis=0)
    found = [result["metrics"][n] for n in ("t2i_R@1", "i2t_R@5")]
    assert found == pytest.approx(expected.tolist())
    assert result["folds"] == 3
    assert not list((tmp_path / "b").glob("fold-*"))

    # stopped before its tiles are removed: other images have other tiles
    monkeypatch.setattr(ScoreTiles, "remove", ScoreTiles.release)
    evaluated(store, tmp_path / "c", images=str(tmp_path / "some.txt"))
    (tmp_path / "others.txt").write_text("\n".join(ids[8:14]) + "\n")
    result = evaluated(store, tmp_path / "c", images=str(tmp_path / "others.txt"))
    expected = recalls_of(scores, pairs, np.arange(8, 14))
    assert [result["metrics"][n] for n in ("t2i_R@1", "i2t_R@5")] == pytest.approx(expected)

    (tmp_path / "none.txt").write_text("nowhere\n")
    with pytest.raises(UsageError, match="1 of 1 images are not in"):
        evaluated(store, tmp_path / "d", images=str(tmp_path / "none.txt"))
