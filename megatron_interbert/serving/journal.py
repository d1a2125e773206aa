"""What was added, changed and removed of an index's items, in order: one file for all its versions.

A version of the index remembers the `Mark` behind the last change that is in it, and journal.end the
last one that was confirmed.
"""

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from megatron_interbert.errors import Unreadable, UsageError
from megatron_interbert.files import alone, flush_folder, reading, write_all, write_bytes
from megatron_interbert.serving.items import Item, item_of
from megatron_interbert.serving.journal_format import (
    MEND,
    MISSING,
    Content,
    Mark,
    OldJournal,
    Record,
    as_text,
    head_of,
    parse,
    read_from_old_place,
    sum_of,
)

JOURNAL, WRITING = "journal.jsonl", "writing"
END = "journal.end"  # the place behind the last change that was confirmed


class NotKept(RuntimeError):
    """A change that could not be written down, and so did not happen."""


def read_content(folder: Path, where: str = "") -> Content | None:
    """Give the journal of an index; None where there is none. UsageError where it is damaged."""
    path = folder / JOURNAL
    where = where or str(path)
    confirmed = read_end(folder)  # first: a writer may confirm a change while we read
    try:
        with reading(where):
            data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{where}: is no file ({error.strerror}); {MEND}") from error

    old = OldJournal.parse(data, where)
    content = old.renewed() if old else parse(data, where)
    if confirmed and confirmed.journal == content.name and confirmed.place > content.end.place:
        raise UsageError(
            f"{where}: ends with change {content.end.place}, but {confirmed.place} were confirmed;"
            f" restore the file, or remove {folder / END} to do without the others"
        )
    return content


def read_end(folder: Path) -> Mark | None:
    """Give the place behind the last change that was confirmed; None where it is not told."""
    try:
        with reading(folder / END):
            fields = json.loads((folder / END).read_bytes())
    except Unreadable:
        raise
    except (OSError, ValueError, RecursionError):
        return None  # there is none, or a crash has cut it

    kinds = {"journal": str, "place": int, "sum": str}
    if isinstance(fields, dict) and {name: type(value) for name, value in fields.items()} == kinds:
        return Mark(**fields)
    return None


def read_journal(folder: Path, mark: "Mark | int") -> tuple[list[Record], Mark]:
    """Give the changes from a place on, and the place behind them. UsageError where they are not all there."""
    content = read_content(folder)
    where = folder / JOURNAL
    if isinstance(mark, int):  # of a version made by an earlier version of this package
        return read_from_old_place(content, mark, where)

    if content is None:
        raise UsageError(f"{where}: {MISSING}; {MEND}")
    if content.name != mark.journal:
        raise UsageError(
            f"{where}: of another index ({content.name}, expected {mark.journal}); {MEND}"
        )

    before = mark.place - content.trimmed
    if not 0 <= before <= len(content.changes):
        raise UsageError(
            f"{where}: holds changes {content.trimmed} to {content.end.place}, but the index goes on"
            f" from {mark.place}; {MEND}"
        )
    if content.sums[before] != mark.sum:
        raise UsageError(
            f"{where}: its first {mark.place} changes are not those that the index was made with; {MEND}"
        )
    return content.changes[before:], content.end


def has_changes(folder: Path) -> bool:
    """Whether a journal is there that says that something was ever changed; a damaged one may."""
    try:
        content = read_content(folder)
    except Unreadable:
        raise
    except UsageError:
        return True
    return content is not None and content.end.place > 0


def collapsed(records: Sequence[Record]) -> dict[str, Item | None]:
    """Give what came last of each item: the item, or None where it was removed."""
    found: dict[str, Item | None] = {}
    for record in records:
        item = item_of(record["put"], JOURNAL) if "put" in record else None
        item_id = item.item_id if item else record["remove"]
        found.pop(item_id, None)
        found[item_id] = item
    return found


def begin(folder: Path) -> Mark:
    """Make a journal without changes; by the process that builds. One that holds changes is set aside."""
    if has_changes(folder):
        set_aside(folder)
    name = uuid.uuid4().hex[:12]
    first = sum_of("", name.encode())
    write_bytes(folder / JOURNAL, head_of(name, 0, first))
    flush_folder(folder)
    return Mark(name, 0, first)


def set_aside(folder: Path) -> None:
    """Give a journal that is not used any more another name: a person can still read it."""
    os.rename(folder / JOURNAL, folder / f"unused-{JOURNAL}-{uuid.uuid4().hex[:12]}")


class Journal:
    """Writes to the journal of a folder, one process at a time.

    What was written survives a crash, what could not be is not there. The folder may be renamed
    meanwhile: it is held open.
    """

    def __init__(self, folder: Path) -> None:
        """Keep other writers out; UsageError where there is one. The file is opened by `open`."""
        self.folder = folder
        self._alone = alone(
            folder / WRITING,
            "another service with a key writes to this index; give each its own --index",
        )
        self._alone.__enter__()
        self._folder = os.open(folder, os.O_RDONLY)
        self._file = self._end = -1

    def open(self) -> Mark:
        """Open the file and check it; the place behind its last change. What was open stays so until then."""
        content = self._content()
        file = os.open(JOURNAL, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW, dir_fd=self._folder)
        try:
            end = os.open(END, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=self._folder)
        except OSError:
            os.close(file)
            raise

        self.release()
        self._file = file
        self._end = end
        self._size = os.fstat(file).st_size
        self.end = content.end
        self._note_end()
        return self.end

    def _content(self) -> Content:
        """Read it, and write anew what was cut by a crash or made by an earlier version of this package."""
        content = read_content(self._place, str(self.folder / JOURNAL))
        if content is None:
            raise UsageError(f"{self.folder / JOURNAL}: {MISSING}; {MEND}")
        if not content.whole:
            self._replace(content)
        return content

    @property
    def _place(self) -> Path:
        """The folder, whatever its name is now."""
        return Path(f"/proc/self/fd/{self._folder}")

    def write(self, record: Record) -> None:
        """Append a change, on disk when this returns. NotKept where it cannot be; then nothing of it stays."""
        text = as_text(record)
        try:
            self._check_place()
            sum_behind = sum_of(self.end.sum, text)
            write_all(self._file, sum_behind.encode() + b" " + text + b"\n")
            os.fsync(self._file)
        except (OSError, UsageError) as error:
            with contextlib.suppress(OSError):  # else before the next change
                os.ftruncate(self._file, self._size)
            raise NotKept(
                f"{self.folder / JOURNAL}: the change cannot be kept ({error})"
            ) from error

        self._size = os.fstat(self._file).st_size
        self.end = Mark(self.end.journal, self.end.place + 1, sum_behind)
        self._note_end()

    def _note_end(self) -> None:
        """Remember what was confirmed; it may lag behind the journal and never be ahead of it."""
        with contextlib.suppress(OSError):
            os.pwrite(self._end, json.dumps(dataclasses.asdict(self.end)).ljust(120).encode(), 0)

    def _check_place(self) -> None:
        """See that what is written will be found: our file is there, by its name, and ends where we did.

        One that somebody has deleted is put back: we hold it open. NotKept where another one is there.
        """
        ours = os.fstat(self._file)
        try:
            there = os.stat(JOURNAL, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            whole = os.pread(self._file, self._size, 0)
            self._replace(parse(whole, str(self.folder / JOURNAL)))
            self.open()
            return

        if (there.st_ino, there.st_dev) != (ours.st_ino, ours.st_dev):
            self._take_other()
        elif ours.st_size != self._size:
            os.ftruncate(self._file, self._size)

    def _take_other(self) -> None:
        """Go on with another file in the place of ours that holds the same changes; NotKept where it does not."""
        content = self._content()
        if content.end != self.end:
            raise NotKept(
                f"{self.folder / JOURNAL}: another file is there than the one that was opened; start again"
            )
        self.open()

    def trim(self, place: int) -> None:
        """Forget the changes before a place. Those who read see the file before or after."""
        content = self._content()
        gone = place - content.trimmed
        if 0 < gone <= len(content.changes):
            self._replace(
                dataclasses.replace(
                    content,
                    trimmed=place,
                    changes=content.changes[gone:],
                    sums=content.sums[gone:],
                    lines=content.lines[gone:],
                )
            )
            self.open()

    def _replace(self, content: Content) -> None:
        """Put a content in the place of the file's."""
        head = head_of(content.name, content.trimmed, content.sums[0])
        data = b"".join([head, *(line + b"\n" for line in content.lines)])
        write_bytes(self._place / JOURNAL, data)
        os.fsync(self._folder)

    def release(self) -> None:
        """Close the files; others still cannot write."""
        for handle in (self._file, self._end):
            if handle >= 0:
                os.close(handle)
        self._file = self._end = -1

    def close(self) -> None:
        """No more changes."""
        self.release()
        os.close(self._folder)
        self._alone.__exit__(None, None, None)
