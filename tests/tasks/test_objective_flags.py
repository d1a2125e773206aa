"""Test which flags of objectives go together, and what follows from the data."""

import dataclasses

import numpy as np
import pytest

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.pretraining.job import heads_of
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from tests.corpus import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Write a store whose regions have attributes."""
    return write_store(tmp_path_factory.mktemp("flags") / "store", images=24, num_attributes=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": "msm,mrf"}, r"unknown 'mrf' \(did you mean 'mrfr'"),
        ({"objective_weights": "itm"}, "'itm', expected NAME:WEIGHT with a positive number"),
        ({"objective_weights": "itm:-1"}, "expected NAME:WEIGHT"),
        ({"objective_weights": "wra:1"}, "wra is not among --objectives"),
        (
            {"objective_mix": "msm:1", "objectives": "msm,itm"},
            "draws msm, but --objectives are msm,itm",
        ),
        ({"objective_mix": "wra:1", "objectives": "wra"}, "wra has no steps of its own"),
        ({"objectives": "msm,vqa"}, "vqa needs --questions"),
        ({"questions": "x.yaml"}, "nothing is trained on their answers"),
        ({"objective_mix": "msm:1", "objectives": "msm,wra"}, "wra needs itm"),
    ],
)
def test_objectives_that_make_no_sense(change, message):
    config = dataclasses.replace(RunConfig(), **change)
    config.given = {"objectives"}
    with pytest.raises(UsageError, match=message):
        config.check()


def test_stores_without_labels_take_other_objectives():
    config = RunConfig()
    config.fit_objectives(has_labels=False)
    assert config.objectives == "msm,mrfr,itm"
    assert "the regions have no class labels to predict" in config.notes[0]
    task = PretrainingTask(config, has_labels=False)
    assert task.names == ("msm", "mrfr", "itm")
    assert heads_of(config, False) == ("msm", "itm", "mrfr")

    mixed = RunConfig(objective_mix="msm:1,itm:2")
    mixed.fit_objectives(has_labels=True)
    assert mixed.objectives == "msm,itm"
    given = RunConfig(objectives="mrm")
    given.given = {"objectives"}
    given.fit_objectives(has_labels=False)
    assert given.objectives == "mrm"
    assert np.isclose(PretrainingTask(given).factors[""].sum(), 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"objective_mix": "msm:1,mrfr:1", "objective_weights": "mrfr:0.5"}, ""),
        ({"objective_weights": "mrfr:0.5"}, "mrfr is not among --objectives msm,mrm,itm"),
        ({"objective_mix": "wra:1,msm:1"}, "wra has no steps of its own"),
        ({"objective_mix": "itm:1,msm:1", "objective_weights": "mrm:2"}, "mrm is not among"),
        ({"objective_weights": "mrx:2"}, "unknown 'mrx'"),
    ],
)
def test_flags_of_objectives_are_checked_once_these_are_known(store, more, message):
    def prepare():
        config = RunConfig(data_path=str(store), **more)
        config.check()
        config.fit_objectives(has_labels=True)

    if not message:
        prepare()
        return

    with pytest.raises(UsageError, match=message):
        prepare()


def test_weights_for_objectives_of_a_store_without_labels(store):
    config = RunConfig(data_path=str(store), objective_weights="mrfr:0.5")
    config.check()
    config.fit_objectives(has_labels=False)
    assert config.weights_of_objectives() == {"msm": 1.0, "mrfr": 0.5, "itm": 1.0, "wra": 0.1}
