"""Test tiles of scores on disk: which folders are ours, and which tiles are sound."""

import os
import shutil

import numpy as np
import pytest

from megatron_interbert.errors import TrainingStopped, UsageError
from megatron_interbert.tasks.retrieval.tiles import ScoreTiles


def test_folders_of_others_stay(tmp_path):
    """Check this whatever their names; in our own folders only our own files are removed."""
    left = ScoreTiles(tmp_path, (4, 4), (2, 2), {"weights": 1})
    left.write((0, 0), np.zeros((2, 2), np.float32))
    kept = ScoreTiles(tmp_path, (4, 4), (2, 2), {"weights": 2})
    kept.write((0, 0), np.zeros((2, 2), np.float32))
    left.release()
    kept.release()
    (kept.folder / "notes.txt").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(left.folder, elsewhere)
    (tmp_path / "tiles-00000000deadbeef").symlink_to(elsewhere)
    for name in ("tiles-bathroom", "tiles-0123456789abcdef"):
        shutil.copytree(elsewhere, tmp_path / name)

    (tmp_path / "tiles-ffffffffffffffff").write_text("a file")

    ScoreTiles(tmp_path, (4, 4), (2, 2), {"weights": 3}).remove()
    assert not left.folder.exists()
    assert [path.name for path in kept.folder.iterdir()] == ["notes.txt"]
    names = {path.name for path in tmp_path.iterdir()} - {kept.folder.name}
    assert names == {
        *("elsewhere", "tiles-00000000deadbeef", "tiles-bathroom"),
        *("tiles-0123456789abcdef", "tiles-ffffffffffffffff"),
    }

    for name in ("elsewhere", "tiles-bathroom", "tiles-0123456789abcdef"):
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "plan.json",
            "scores-00000000-00000000.npy",
        }


@pytest.mark.parametrize(
    "make_other",
    [lambda path: path.symlink_to("elsewhere"), lambda path: path.write_text("a file")],
)
def test_tiles_are_not_written_through_what_is_no_folder(tmp_path, make_other):
    tiles = ScoreTiles(tmp_path, (4, 4), (2, 2), {})
    tiles.remove()
    (tmp_path / "elsewhere").mkdir()
    make_other(tiles.folder)
    with pytest.raises(UsageError, match="expected a folder of tiles, found something else"):
        ScoreTiles(tmp_path, (4, 4), (2, 2), {})

    assert not list((tmp_path / "elsewhere").iterdir())


def other_numbers(file, other):
    np.save(file.open("wb"), np.ones((2, 2), np.float32))


def cut_off(file, other):
    os.truncate(file, 100)


def of_another_place(file, other):
    shutil.copyfile(other, file)


@pytest.mark.parametrize("spoil", [other_numbers, cut_off, of_another_place])
def test_a_tile_that_was_changed_is_scored_anew(tmp_path, capsys, spoil):
    tiles = ScoreTiles(tmp_path, (4, 4), (2, 2), {})
    for number, place in enumerate(tiles.places):
        tiles.write(place, np.full((2, 2), number, np.float32))

    assert tiles.missing() == []
    assert [scores[0, 0] for _, _, scores in tiles.read()] == [0, 1, 2, 3]
    assert capsys.readouterr().out == ""

    files = sorted(tiles.folder.glob("scores-*"))
    spoil(files[1], files[2])
    with pytest.raises(TrainingStopped, match="has changed since it was written"):
        list(tiles.read())

    assert tiles.missing() == [(0, 2)]
    assert (
        "tiles that are damaged or of an earlier version are scored again:"
        " scores-00000000-00000002.npy" in capsys.readouterr().out
    )
