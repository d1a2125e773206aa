"""Test parts of topic scores on disk: which plan they belong to, and whether they are sound."""

import sys

import numpy as np
import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.shop import topic_scores

PLAN = {"weights": {"w": "1"}, "items_of_part": 2}


@pytest.fixture
def parts(tmp_path):
    """Make a folder of scores with one whole part; return a function that writes others."""
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="pyarrow is not installed (pip install -r requirements.txt)"
    )
    import pyarrow

    def write(name, rows, plan):
        metadata = {topic_scores.PLAN_SHA256: topic_scores.digest_of(plan)} if plan else None
        table = pyarrow.table({"score": np.arange(rows, dtype=np.float32)}, metadata=metadata)
        parquet.write_table(table, tmp_path / name, write_page_checksum=True, compression="none")
        return tmp_path / name

    topic_scores.claim(tmp_path, PLAN)
    write("part-000000000.parquet", 40, PLAN)

    return write


def missing(folder):
    return topic_scores.missing_parts(folder, {0: 40, 2: 40}, topic_scores.digest_of(PLAN))


def test_parts_without_a_plan_are_refused(tmp_path, parts):
    """Check this, because parts of other weights would pass for the model's own."""
    (tmp_path / "_plan.json").unlink()

    with pytest.raises(
        UsageError,
        match=r"holds part-000000000.parquet, but no _plan.json that says which weights",
    ):
        topic_scores.claim(tmp_path, PLAN)

    assert [path.name for path in tmp_path.iterdir()] == ["part-000000000.parquet"]


def test_a_part_of_an_earlier_version_is_scored_anew(tmp_path, parts):
    """Check this, because such a part does not record its plan and has no checksums."""
    parts("part-000000002.parquet", 40, None)
    assert missing(tmp_path) == [2]


def test_a_part_of_another_plan_is_refused(tmp_path, parts):
    assert missing(tmp_path) == [2]
    parts("part-000000002.parquet", 40, {"weights": {"w": "2"}, "items_of_part": 2})
    with pytest.raises(
        UsageError, match=r"part-000000002.parquet: holds scores of other weights, data or settings"
    ):
        missing(tmp_path)


def test_a_part_that_was_changed_is_scored_anew(tmp_path, parts, capsys):
    path = parts("part-000000002.parquet", 40, PLAN)
    assert missing(tmp_path) == []
    assert capsys.readouterr().out == ""

    whole = path.read_bytes()
    place = whole.index(np.float32(7).tobytes())
    for content in (
        whole[:100],
        b"",
        whole[:place] + b"\1" + whole[place + 1 :],
        whole[:-20] + b"?" * 20,
    ):
        path.write_bytes(content)
        assert missing(tmp_path) == [2]
        assert "scored again: part-000000002.parquet" in capsys.readouterr().out

    parts("part-000000002.parquet", 39, PLAN)
    assert missing(tmp_path) == [2]


def test_a_pyarrow_that_cannot_be_imported_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match="Parquet needs pyarrow"):
        topic_scores.check_parquet()
