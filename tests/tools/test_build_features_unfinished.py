"""Test builds resumed from the files of an interrupted one, which are damaged first."""

import functools
import json
import os
import re
from pathlib import Path

import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.build import build
from megatron_interbert.preparation.building.conversion import write_mark
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.fields import ReadOptions
from megatron_interbert.preparation.building.sources.opening import open_features
from tests.preparation.formats import made_up_images, write_npz
from tests.tools.building import content


def changed(mark, **fields):
    mark.write_text(json.dumps({**json.loads(mark.read_text()), **fields}))


SPOILED = {
    "no fields": lambda mark, shard: mark.write_text("{}"),
    "a list": lambda mark, shard: mark.write_text("[]"),
    "half": lambda mark, shard: os.truncate(mark, 30),
    "no text": lambda mark, shard: mark.write_bytes(b"\xff\xfe"),
    "deep": lambda mark, shard: mark.write_text(100_000 * "["),
    "odd reasons": lambda mark, shard: changed(mark, reasons={"x": "y"}),
    "odd lines": lambda mark, shard: changed(mark, dropped=[1]),
    "odd labels": lambda mark, shard: changed(mark, labels=[]),
    "odd entry": lambda mark, shard: changed(mark, entry={"file": "../../x"}),
    "odd count": lambda mark, shard: changed(mark, read="many"),
    "a cut shard": lambda mark, shard: os.truncate(shard, 3000),
    "no shard": lambda mark, shard: shard.unlink(),
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Return (a plan of the store by folder, the hashes of an uninterrupted build)."""
    place = tmp_path_factory.mktemp("unfinished")
    npz = write_npz(place / "npz", made_up_images(12))
    captions = place / "captions.tsv"
    captions.write_text("no tab\n" + "".join(f"image-{n}\ta cat\n" for n in range(12)))
    source = open_features(str(npz), "auto", ReadOptions())
    plan = functools.partial(
        BuildPlan,
        [source],
        caption_files=[str(captions)],
        captions_format="tsv",
        images_per_shard=3,
    )
    build(plan(str(place / "whole")))

    return plan, content(place / "whole")


@pytest.fixture
def interrupted(plans, tmp_path, monkeypatch):
    """Interrupt a build after two of four shards; return its work folder."""
    from megatron_interbert.preparation.building.unit_pool import convert_unit

    def some(job, sources):
        if job.number == 2:
            raise KeyboardInterrupt
        return convert_unit(job, sources)

    with monkeypatch.context() as patch:
        patch.setattr("megatron_interbert.preparation.building.unit_pool.convert_unit", some)
        with pytest.raises(KeyboardInterrupt):
            build(plans[0](str(tmp_path / "store")))

    return tmp_path / "store.partial"


@pytest.mark.parametrize("what", SPOILED)
def test_a_part_that_does_not_fit_is_done_anew_and_said(plans, interrupted, capfd, what):
    plan, whole = plans
    shard = interrupted / "shard-00001.h5"
    SPOILED[what](shard.with_name("shard-00001.h5.json"), shard)
    build(plan(str(interrupted.with_name("store"))))
    assert content(interrupted.with_name("store")) == whole
    err = capfd.readouterr().err
    assert err.count("is done again") == 1
    assert "shard-00001.h5.json" in err


def test_what_fits_is_kept_without_a_word(plans, interrupted, capfd):
    plan, whole = plans
    build(plan(str(interrupted.with_name("store"))))
    assert content(interrupted.with_name("store")) == whole
    assert "anew" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "data"),
    [("plan.json", b"[1"), ("captions.json", b"5"), ("captions.json", b"[1]"), ("images.db", b"x")],
)
def test_what_cannot_be_done_anew_in_part_is_one_line(plans, interrupted, name, data):
    (interrupted / name).write_bytes(data)
    with pytest.raises(UsageError, match=name.replace("images.db", "store.partial")) as refusal:
        build(plans[0](str(interrupted.with_name("store"))))
    assert "\n" not in str(refusal.value)


def test_a_unit_is_marked_under_a_name_of_this_process(tmp_path, monkeypatch):
    """Two builds may finish the same unit: the worker of a killed one, and the resumed one."""
    temporary = []
    replace = os.replace

    def spy(source, target):
        temporary.append(Path(source).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    write_mark(tmp_path / "shard.json", {"read": 3})
    assert len(temporary) == 1
    assert re.fullmatch(rf"shard\.json\.{os.getpid()}-[0-9a-f]+\.new", temporary[0])
    assert json.loads((tmp_path / "shard.json").read_text()) == {"read": 3}
