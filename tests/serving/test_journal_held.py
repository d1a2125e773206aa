"""Test a journal whose file, lock or folder is changed by others while it is being written.

Confirmed changes stay, or further changes are refused.
"""

import logging
import os
import shutil

import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.serving.index import (
    served_version,
    version_to_replay,
    write_version,
)
from megatron_interbert.serving.items import Item
from megatron_interbert.serving.journal import (
    END,
    JOURNAL,
    WRITING,
    Journal,
    NotKept,
    begin,
    end_is_known,
    read_content,
)
from tests.serving.test_vector_file import ITEMS, vectors


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "index"
    place.mkdir()
    write_version(place, ITEMS, vectors(), "exact", {}, begin(place))
    return place


@pytest.fixture
def journal(folder):
    """Open a journal with two changes."""
    found = opened(folder)
    change(found, "i1")
    change(found, "i2")
    yield found
    found.close()


def opened(folder):
    found = Journal(folder)
    found.open()
    return found


def refused_to_open(folder):
    """Assert that opening the journal raises UsageError; return its text."""
    found = Journal(folder)
    with pytest.raises(UsageError) as told:
        found.open()
    found.close()

    return str(told.value)


def change(journal, item_id):
    journal.write({"remove": item_id})


def removed(folder):
    return [record["remove"] for record in read_content(folder).changes]


def refused(journal, why):
    """Assert that a change is refused, with an error that does not show the descriptor's path."""
    with pytest.raises(NotKept, match=why) as told:
        change(journal, "refused")
    assert "/proc/" not in str(told.value)


def test_a_lock_that_was_removed_lets_nobody_write_beside(folder, journal):
    """Check that only the holder of the lock writes; the other refuses, and loses nothing that was
    confirmed.
    """
    (folder / WRITING).unlink()
    second = opened(folder)
    for number in range(3):
        refused(journal, f"{folder}: another service with a key writes to this index")
        change(second, f"second{number}")

    assert removed(folder) == ["i1", "i2", "second0", "second1", "second2"]

    second.close()  # its lock is free again, but its changes are not ours
    refused(journal, "holds something other than the changes confirmed")
    journal.close()
    assert removed(folder) == ["i1", "i2", "second0", "second1", "second2"]


@pytest.mark.parametrize("how", ["removed", "copied"])
def test_a_lock_that_nobody_else_took_is_taken_again(folder, journal, how):
    (folder / WRITING).unlink()
    if how == "copied":
        (folder / WRITING).touch()

    change(journal, "i3")
    with pytest.raises(UsageError, match="another service with a key"):
        Journal(folder)

    assert removed(folder) == ["i1", "i2", "i3"]


@pytest.mark.parametrize("size", [0, 1, 120, -1])
def test_a_journal_that_is_cut_in_place_comes_back_whole(folder, journal, size, caplog):
    """Check a cut such as logrotate's copytruncate makes: the next change restores the file, and so
    does the end of the service.
    """
    whole = (folder / JOURNAL).read_bytes()
    size = size % len(whole)
    os.truncate(folder / JOURNAL, size)
    change(journal, "i3")
    assert (folder / JOURNAL).read_bytes().startswith(whole)
    assert removed(folder) == ["i1", "i2", "i3"]
    assert caplog.text.count(f"{folder / JOURNAL} was cut; restored it") == 1

    os.truncate(folder / JOURNAL, size)
    journal.close()
    assert removed(folder) == ["i1", "i2", "i3"]


@pytest.mark.parametrize("other", [b"\n", b"something else\n" * 50, "zeros"])
def test_a_journal_that_is_overwritten_in_place_takes_no_change(folder, journal, other):
    """Check this also for as many bytes; confirmed changes come back once that file is moved
    away.
    """
    size = (folder / JOURNAL).stat().st_size
    with open(folder / JOURNAL, "r+b") as file:
        file.truncate(0)
        file.write(bytes(size) if other == "zeros" else other)

    os.utime(folder / JOURNAL)
    there = (folder / JOURNAL).read_bytes()
    for _ in range(2):
        refused(journal, "start the service again to use that file, or move it away")

    assert (folder / JOURNAL).read_bytes() == there

    (folder / JOURNAL).rename(folder / "elsewhere")
    change(journal, "i3")
    assert removed(folder) == ["i1", "i2", "i3"]


def test_what_a_failed_write_has_left_is_taken_back_and_nothing_else(folder, journal, monkeypatch):
    """Check that a torn line that could not be removed is removed before the next change; lines of
    others stay.
    """

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        patch.setattr(os, "ftruncate", fail)
        refused(journal, r"journal\.jsonl: the change cannot be saved \(No space left on device\)")

    change(journal, "i3")
    assert removed(folder) == ["i1", "i2", "i3"]

    with open(folder / JOURNAL, "ab") as file:
        file.write(b"a line of others\n")

    refused(journal, "holds something other")
    assert (folder / JOURNAL).read_bytes().endswith(b"a line of others\n")


def test_another_folder_in_the_place_of_ours_takes_no_change(folder, journal):
    """Check a backup put in its place; a renamed folder with nothing in its place is still ours."""
    backup = folder.with_name("backup")
    moved = folder.with_name("moved")
    shutil.copytree(folder, backup, symlinks=True)
    folder.rename(moved)
    change(journal, "i3")
    backup.rename(folder)
    refused(journal, f"{folder}: replaced by another folder since it was opened")
    with pytest.raises(NotKept, match="another folder"):
        journal.trim(1)

    assert removed(folder) == ["i1", "i2"]
    assert removed(moved) == ["i1", "i2", "i3"]


def test_errors_name_the_folder_as_it_was_given(folder, monkeypatch):
    """Check that the path is not that of the descriptor, and is relative if it was given so."""
    journal = opened(folder)
    change(journal, "i1")
    journal.close()
    whole = (folder / JOURNAL).read_bytes()
    (folder / JOURNAL).write_bytes(whole.split(b"\n")[0] + b"\n")

    for name in (folder, folder.relative_to(folder.parent)):
        monkeypatch.chdir(folder.parent)
        told = refused_to_open(name)
        assert told.startswith(f"{name}/{JOURNAL}: ends with change 0, but 1 were confirmed")
        assert f"or remove {name}/{END} " in told
        assert "/proc/" not in told


def test_a_lost_end_is_known(folder, journal):
    """Check a journal.end that is missing, empty or of another journal; a journal without changes
    needs none.
    """
    assert end_is_known(folder)
    for text in ("", "{}", '{"journal": "x", "place": 1, "sum": ""}'):
        (folder / END).write_text(text)
        assert not end_is_known(folder)

    (folder / END).unlink()
    assert not end_is_known(folder)
    change(journal, "i3")  # which writes journal.end again
    assert end_is_known(folder)

    begin(folder)
    (folder / END).unlink()
    assert end_is_known(folder)


@pytest.mark.parametrize("name", [JOURNAL, END])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_no_link_is_read_in_the_place_of_our_files(folder, tmp_path, name, kind):
    """Check that it is refused by name, without quoting what it leads to."""
    secret = tmp_path / "secret"
    secret.write_text("root:x:0:0")
    (folder / END).touch()
    (folder / name).unlink()

    if kind == "link":
        (folder / name).symlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()

    with pytest.raises(
        UsageError, match=f"{folder / name}: expected a plain file, found a link"
    ) as told:
        read_content(folder)

    assert "root:" not in str(told.value)
    assert "expected a plain file" in refused_to_open(folder)


def test_a_file_of_others_is_not_told(folder):
    """Check this because a hard link, or a file copied over ours, may hold secrets."""
    (folder / JOURNAL).write_text("root:x:0:0\nsecret")
    with pytest.raises(
        UsageError, match="its first line is damaged or missing; restore the file"
    ) as told:
        read_content(folder)

    assert "root:" not in str(told.value)


@pytest.mark.parametrize("damage", ["vectors.faiss", "items.jsonl", "manifest.json"])
@pytest.mark.parametrize("kind", ["damaged", "missing"])
def test_the_only_version_that_is_damaged_names_the_ways_out(folder, damage, kind):
    """Check that serving it names all ways out, and building from it those that are left."""
    file = served_version(folder).path / damage

    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])

    def serve():
        version = served_version(folder)
        version.items()
        version.vectors()

    ways_out = "restore it from a backup, or .*begin anew from your items"
    with pytest.raises(UsageError, match=f"{file}: .*; {ways_out}"):
        serve()

    if damage != "vectors.faiss":  # which a new version does not need
        ways_out = "restore it from a backup, or begin anew from your items"
        with pytest.raises(
            UsageError, match=f"{file}: .* no version before it is whole; {ways_out}"
        ):
            version_to_replay(folder)


def test_a_missing_link_is_told_once_and_a_folder_in_its_place_by_name(folder, caplog):
    version = served_version(folder).path
    (folder / "current").unlink()
    shutil.copytree(version, folder / "current")
    with caplog.at_level(logging.WARNING):
        write_version(folder, [Item("a", "p1", "t")], vectors(count=1), "exact", {}, begin(folder))

    assert "is kept as" in caplog.text
    assert "unused-current-" in caplog.text
