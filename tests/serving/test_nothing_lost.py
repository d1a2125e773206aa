"""Test that confirmed changes survive whatever happens to an index's folder, or else the index is
refused by name.
"""

import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from megatron_interbert.errors import Unreadable, UsageError
from megatron_interbert.serving.index import (
    CURRENT,
    FACTS,
    VECTORS,
    Version,
    needed_from,
    prune,
    served_version,
    version_names,
    version_to_replay,
    write_version,
)
from megatron_interbert.serving.items import Item
from megatron_interbert.serving.journal import (
    END,
    JOURNAL,
    Journal,
    NotKept,
    begin,
    has_changes,
    read_journal,
)
from tests.launching import ENVIRONMENT
from tests.serving.made_shop import flags
from tests.serving_client import KEY, Service

MODEL = {"weights": {"a": "b"}}
ITEMS = [Item(f"i{n}", f"p{n}", f"title {n}", {"price": str(n)}) for n in range(20)]


def vectors(count):
    return np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)


def write(folder, mark, items=ITEMS):
    return write_version(folder, items, vectors(len(items)), "exact", MODEL, mark)


@pytest.fixture
def index(tmp_path):
    """Make an index with two versions and, after the second, two changes: i3 removed, new added."""
    folder = tmp_path / "index"
    folder.mkdir()
    mark = begin(folder)
    write(folder, mark)
    write(folder, mark)
    journal = Journal(folder)
    journal.open()
    journal.write({"remove": "i3"})
    journal.write({"put": Item("new", "p1", "一件").record()})
    journal.close()

    return folder


EXPECTED = {item.item_id for item in ITEMS} - {"i3"} | {"new"}


def there(folder):
    return {item.item_id for item in served_version(folder).items_now()[0]}


@pytest.mark.parametrize("link", ["missing", "dangling", "a copy without links"])
def test_changes_survive_without_the_link(index, link):
    """Check a backup that does not keep links, one that lacks the served version, and one with a
    folder in place of the link.
    """
    newest = (index / CURRENT).resolve().name
    (index / CURRENT).unlink()
    if link == "dangling":
        (index / CURRENT).symlink_to("0123456789ab")
    if link == "a copy without links":
        shutil.copytree(index / newest, index / CURRENT)

    assert served_version(index).name == newest
    assert there(index) == EXPECTED


def test_a_version_that_is_damaged_stands_for_nothing(index):
    """Check that without the link the newest whole version is found; if there is none, the index is
    refused, and so is a journal alone.
    """
    older, newest = sorted(version_names(index), key=lambda name: Version(index / name).number)
    (index / CURRENT).unlink()

    for name, left in ((newest, older), (older, None)):
        with open(index / name / VECTORS, "r+b") as file:
            file.write(b"\xff")
        if left:
            assert served_version(index).name == left
            assert there(index) == EXPECTED

    with pytest.raises(
        UsageError, match="no version of the index is usable, but there are traces of one"
    ):
        served_version(index)

    for name in (older, newest):
        shutil.rmtree(index / name)
    with pytest.raises(UsageError, match=r"traces of one \(journal\.jsonl\)"):
        served_version(index)


@pytest.mark.parametrize("target", ["../elsewhere", "/tmp", "."])
def test_our_link_names_a_sibling_only(index, target):
    (index / CURRENT).unlink()
    (index / CURRENT).symlink_to(target)
    with pytest.raises(UsageError, match="expected a folder beside it"):
        served_version(index)


def test_no_clock_decides_what_is_pruned(index):
    """Check versions with times in the future, as from a machine whose clock was ahead, and that
    damaged versions do not push out sound ones.
    """
    for name in version_names(index):
        os.utime(index / name, (4e9, 4e9))

    mark = served_version(index).items_now()[1]
    for _ in range(3):
        made = write(index, mark)
        prune(index, [])
        assert served_version(index).name == made

    assert len(version_names(index)) == 2

    good = served_version(index).name
    for _ in range(2):
        made = write(index, mark)
        with open(index / made / VECTORS, "r+b") as file:
            file.write(b"\xff")

    (index / CURRENT).unlink()
    prune(index, [])
    assert good in version_names(index)


@pytest.mark.parametrize(
    "damage", ["deleted", "empty", "of another index", "a folder", "older copy"]
)
def test_a_journal_that_is_not_the_one_is_refused(index, tmp_path, damage):
    file = index / JOURNAL
    begun = file.read_bytes().split(b"\n")[0] + b"\n"
    served = served_version(index)
    write(
        index, served.items_now()[1]
    )  # it holds both changes, so an older copy of the journal does not reach it
    file.unlink()
    if damage == "empty":
        file.touch()
    if damage == "of another index":
        other = tmp_path / "other"
        other.mkdir()
        begin(other)
        shutil.copy(other / JOURNAL, file)

    if damage == "a folder":
        file.mkdir()
    if damage == "older copy":
        file.write_bytes(begun)
    with pytest.raises(UsageError, match=r"journal\.jsonl: .*(restore the file|begin anew)"):
        there(index)


def test_a_place_that_was_moved_and_a_letter_that_was_altered_are_named(index):
    """Check changes to a version's manifest, a title and the journal's first line, a missing line,
    two swapped lines and inserted ones.
    """
    served = served_version(index)
    facts = json.loads((served.path / FACTS).read_text())

    for change in ({"place": 1}, {"sum": "0" * 16}, {"journal": "0" * 12}):
        (served.path / FACTS).write_text(
            json.dumps({**facts, "journal": {**facts["journal"], **change}})
        )
        with pytest.raises(UsageError, match="not as it was written"):
            served_version(index)

    (served.path / FACTS).write_text(json.dumps(facts))

    file = index / JOURNAL
    whole = file.read_bytes()
    head, first, second = whole.split(b"\n")[:-1]
    for lines in (
        (head, first, second.replace("一".encode(), "二".encode())),
        (head.replace(b'"trimmed": 0', b'"trimmed": 1'), first, second),
        (head, second),
        (head, second, first),
        (head, first, b"123", second),
        (head, first, b'{"put": {}}'),
    ):
        file.write_bytes(b"\n".join(lines) + b"\n")
        with pytest.raises(UsageError, match=r"journal\.jsonl: "):
            there(index)

    file.write_bytes(whole[:-1])  # without the last newline nothing is lost
    assert there(index) == EXPECTED
    file.write_bytes(whole[:-1] + b"\x0b")
    assert there(index) == EXPECTED


def test_a_journal_that_is_deleted_while_it_is_written_comes_back(index):
    """Check that it comes back whole; another file in its place takes no changes."""
    mark = served_version(index).mark
    journal = Journal(index)
    journal.open()
    (index / JOURNAL).unlink()
    journal.write({"remove": "i5"})
    assert [change.get("remove") for change in read_journal(index, mark)[0]] == ["i3", None, "i5"]

    moved = index.with_name("moved")
    index.rename(moved)  # writes follow the folder
    journal.write({"remove": "i6"})
    assert there(moved) == EXPECTED - {"i5", "i6"}

    shutil.copy(moved / JOURNAL, moved / "copy")
    os.replace(moved / "copy", moved / JOURNAL)  # the same changes in another file
    journal.write({"remove": "i7"})
    assert there(moved) == EXPECTED - {"i5", "i6", "i7"}

    whole = (moved / JOURNAL).read_bytes()
    (moved / "copy").write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    os.replace(moved / "copy", moved / JOURNAL)  # an older one
    with pytest.raises(NotKept, match="cannot be saved"):
        journal.write({"remove": "i8"})

    journal.close()
    (moved / JOURNAL).write_bytes(whole)
    assert there(moved) == EXPECTED - {"i5", "i6", "i7"}


def test_readers_and_a_writer_at_the_same_time(index):
    """Check that a sound journal is never reported as cut, however fast changes are confirmed."""
    mark = served_version(index).mark
    child = os.fork()
    if not child:
        journal = Journal(index)
        journal.open()
        for number in range(300):
            journal.write({"put": Item(f"n{number}", "p1", "title").record()})
        os._exit(0)

    counts = []
    status = 0
    while not status:
        counts.append(len(read_journal(index, mark)[0]))
        status, code = os.waitpid(child, os.WNOHANG)

    assert code == 0
    assert counts == sorted(counts)
    assert len(counts) > 20
    assert len(read_journal(index, mark)[0]) == 302


def test_failures_in_a_row_confirm_nothing_into_a_broken_journal(index, monkeypatch):
    """Check a change that can neither be flushed nor undone, after which the file is deleted: what
    is confirmed later is there, and nothing else.
    """
    journal = Journal(index)
    journal.open()

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(NotKept):
            journal.write({"remove": "i7"})

    (index / JOURNAL).unlink()
    for name in ("i8", "i9"):
        journal.write({"remove": name})

    assert there(index) == EXPECTED - {"i8", "i9"}

    with monkeypatch.context() as patch:  # no descriptors in the middle of a trim
        opened = os.open
        patch.setattr(
            os,
            "open",
            lambda name, *more, **keys: fail() if name == JOURNAL else opened(name, *more, **keys),
        )
        with pytest.raises(OSError, match="Input/output"):
            journal.trim(1)

    journal.write({"remove": "i10"})
    journal.close()
    assert {change.get("remove") for change in journal_changes(index)} >= {"i8", "i9", "i10"}


def journal_changes(folder):
    from megatron_interbert.serving.journal import read_content

    return read_content(folder).changes


def test_what_cannot_be_read_is_not_given_up(index):
    """Check that nothing is begun anew if a manifest or a journal belongs to another user, whatever
    the flags.
    """
    served = served_version(index)

    def refused(look):
        child = os.fork()
        if not child:
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                look()
            except Unreadable:
                os._exit(0)
            except BaseException:
                os._exit(1)

            os._exit(2)

        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    base = Path(tempfile.gettempdir())
    for path in (index, *index.parents):
        if path.is_relative_to(base) and path != base:
            path.chmod(0o755)

    for file, looks in (
        (
            served.path / FACTS,
            [served_version, version_to_replay, lambda folder: Version(served.path)],
        ),
        (index / JOURNAL, [version_to_replay, has_changes, begin]),
    ):
        file.chmod(0)
        assert all(refused(lambda look=look: look(index)) for look in looks)
        file.chmod(0o644)


def test_a_damaged_version_is_made_anew_from_the_one_before(index):
    """Check that all changes are included, even those that the damaged version held."""
    served = served_version(index)

    for name in ("items.jsonl", FACTS):
        file = served.path / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-20])
        version, items, _ = version_to_replay(index)
        assert version.name != served.name
        assert {item.item_id for item in items} == EXPECTED
        file.write_bytes(whole)


def old_index(folder, lines, trimmed=0, places=(0,)):
    """Make an index as an earlier version of this package left it: places are bytes, and lines have
    no sums.
    """
    for place in places:
        made = folder / write(folder, begin(folder))
        facts = json.loads((made / FACTS).read_text())
        for key in ("number", "manifest_sha256"):
            del facts[key]
        (made / FACTS).write_text(json.dumps({**facts, "journal": place}))

    (folder / JOURNAL).write_text(
        "".join(json.dumps(line) + "\n" for line in [{"trimmed": trimmed}, *lines])
    )


def test_an_index_of_an_earlier_version_keeps_its_changes(tmp_path):
    """Check that it is read as it is and converted by the process that writes; a version that its
    journal does not reach is refused.
    """
    changes = [{"remove": "i3"}, {"put": Item("new", "p1", "一件").record()}]
    second = len(json.dumps(changes[0])) + 1
    old_index(tmp_path, changes, places=(0, second))
    assert there(tmp_path) == EXPECTED
    assert needed_from(tmp_path, "") == 0

    items, mark = served_version(tmp_path).items_now()
    made = write(tmp_path, mark, items)
    journal = Journal(tmp_path)
    journal.open()
    journal.write({"remove": "i9"})
    journal.close()
    assert made == served_version(tmp_path).name

    for name in version_names(tmp_path):
        assert {item.item_id for item in Version(tmp_path / name).items_now()[0]} == EXPECTED - {
            "i9"
        }

    other = tmp_path / "other"
    other.mkdir()
    old_index(other, changes, trimmed=500, places=(20,))
    with pytest.raises(UsageError, match="begins after the place"):
        there(other)

    (other / JOURNAL).unlink()
    with pytest.raises(UsageError, match="missing"):
        there(other)


def mutated(data, draw):
    """Return bytes with a few of them altered, cut, repeated or replaced."""
    data = bytearray(data)

    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(data)) if data else 0
        kind = draw.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + draw.randint(1, 40)]
        elif kind == 3:
            data[at:at] = data[at : at + draw.randint(1, 60)]
        elif kind == 4:
            data[at:at] = draw.choice(
                [b"\0", b"\n", b"{}", b"[" * 3000, b"\xff", b"-1", b"1e400", b'"', b"NaN"]
            )
        else:
            data[at : at + 1] = draw.choice([b"0", b"9", b"null", b"true", b'{"a": 1}', b"[]"])

    return bytes(data)


def test_mutated_journals_and_manifests_are_refused_by_name_or_lose_nothing(index):
    """Check 1,500 of them: there is never a traceback, and an index that is accepted holds all
    confirmed changes.
    """
    draw = random.Random(0)
    refused = 0
    named = 0
    served = served_version(index)

    for file in (index / JOURNAL, served.path / FACTS, served.path / "items.jsonl"):
        whole = file.read_bytes()
        for _ in range(500):
            file.write_bytes(mutated(whole, draw))
            try:
                found = there(index)
            except UsageError as error:
                refused += 1
                named += str(index) in str(error)
                continue

            assert found == EXPECTED

        file.write_bytes(whole)

    assert refused == named > 1200
    assert there(index) == EXPECTED


def test_a_service_keeps_what_it_has_confirmed(shop, tmp_path):
    """Check this through a lost link, a deleted journal and another file in its place; --rebuild
    begins anew.
    """
    index = tmp_path / "index"
    body = {"image_id": "test-000001", "title": "红色"}

    with Service(*flags(shop, index)) as service:
        assert service.call("PUT", "/items/new-1", body, key=KEY)[0] == 201
        assert service.call("DELETE", "/items/test-000005", key=KEY)[0] == 204
        (index / JOURNAL).unlink()
        assert service.call("PUT", "/items/new-2", body, key=KEY)[0] == 201
        whole = (index / JOURNAL).read_bytes()
        (index / "copy").write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
        os.replace(index / "copy", index / JOURNAL)
        status, answer, _ = service.call("PUT", "/items/new-3", body, key=KEY)
        assert (status, "cannot be saved" in answer["error"]) == (503, True)
        assert service.call("GET", "/items/new-3")[0] == 404
        (index / JOURNAL).write_bytes(whole)

    assert "Traceback" not in "".join(service.lines["stderr"])

    (index / CURRENT).unlink()
    (index / END).unlink()

    with Service(*flags(shop, index)) as service:
        told = "".join(service.lines["stderr"])
        assert told.count("names no version; the newest whole one is") == 1
        assert told.count("journal.end: missing or cut; cannot check whether") == 1
        statuses = [
            service.call("GET", f"/items/{name}")[0] for name in ("new-1", "new-2", "test-000005")
        ]
        assert statuses == [200, 200, 404]

    assert (index / CURRENT).is_symlink(), "restored by the process that writes"

    (index / JOURNAL).unlink()
    from tests.launching import launch

    serve = ("python", "-m", "megatron_interbert.serve", *flags(shop, index))
    code, _, err = launch(*serve, **{**ENVIRONMENT, "INTERBERT_API_KEY": KEY})
    assert (code, "journal.jsonl: missing, and with it the changes" in err) == (2, True), err
    code, out, err = launch(*serve, "--rebuild", "--build-only")
    assert code == 0, out + err
    with Service(*flags(shop, index)) as service:
        assert service.call("GET", "/items/new-1")[0] == 404
        assert service.call("PUT", "/items/new-1", body, key=KEY)[0] == 201
