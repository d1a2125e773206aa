"""Test impossible outputs: one line that names the flag, before any work, and nothing is left
behind or damaged.
"""

import sys

import pytest

from tests.corpus import write_store
from tests.launching import ROOT, launch

TOOLS = ROOT / "tools"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"dear")
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.tsv").write_text("")
    write_store(tmp_path / "store", images=3)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "flag", "message"),
    [
        ("inspect_features.py store --output photo.jpg", "--output photo.jpg", "Not a directory"),
        ("inspect_features.py store --json folder", "--json folder", "is a folder"),
        ("inspect_features.py store --json photo.jpg/x", "--json photo.jpg", "Not a directory"),
        ("make_sample.py --output photo.jpg", "--output photo.jpg", "Not a directory"),
        ("make_shop.py --output photo.jpg/x", "--output photo.jpg/x", "Not a directory"),
        ("make_queries.py rows.tsv --output folder", "--output folder", "is a folder"),
        ("build_features.py store --output photo.jpg/x", "--output", "Not a directory"),
        ("build_features.py store --output folder", "--output folder", "already exists"),
    ],
)
def test_they_are_refused(place, command, flag, message):
    tool, *rest = command.split()
    before = sorted(place.rglob("*"))
    code, out, err = launch(sys.executable, TOOLS / tool, *rest, cwd=place)
    assert code == 2, out + err
    assert len(err.strip().splitlines()) == 1, err
    assert flag in err
    assert message in err
    assert sorted(place.rglob("*")) == before
    assert (place / "photo.jpg").read_bytes() == b"dear"


@pytest.mark.parametrize("name", ["train.new", "train.new.partial", "train"])
def test_files_in_the_way_of_generated_stores_stay(place, name):
    (place / "out").mkdir()
    (place / "out" / name).write_bytes(b"dear")
    code, out, err = launch(sys.executable, TOOLS / "make_sample.py", "--output", place / "out")
    assert code == 2, out + err
    assert len(err.strip().splitlines()) == 1, err
    assert f"{place / 'out' / name}: " in err
    assert (place / "out" / name).read_bytes() == b"dear"
