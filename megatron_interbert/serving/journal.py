"""Read and write the journal of an index: all changes and removals of items, in order, in one file
for all versions.

A version of the index records the `Mark` after the last change that it holds, and journal.end the
one after the last change that was confirmed.
"""

import contextlib
import dataclasses
import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_interbert.errors import Unreadable, UsageError
from megatron_interbert.files import flush_folder, open_lock, take_lock, write_all, write_bytes
from megatron_interbert.serving.items import Item, item_of
from megatron_interbert.serving.journal_format import (
    BYTES,
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
from megatron_interbert.serving.own_files import read_own

JOURNAL = "journal.jsonl"
WRITING = "writing"
END = "journal.end"  # the place after the last confirmed change
log = logging.getLogger("megatron_interbert.serving")


class NotKept(RuntimeError):
    """Represent a change that could not be saved, and therefore was not made."""


def read_content(folder: Path) -> Content | None:
    """Read the journal of an index; None if there is none.

    Raises UsageError if it is damaged or lacks confirmed changes.
    """
    path = folder / JOURNAL
    confirmed = read_end(folder)  # first, because a writer may confirm a change while we read

    try:
        data = read_own(path)
    except OSError:
        return None

    old = OldJournal.parse(data, str(path))
    content = old.renewed() if old else parse(data, str(path))
    if confirmed and confirmed.journal == content.name and confirmed.place > content.end.place:
        raise UsageError(
            f"{path}: ends with change {content.end.place}, but {confirmed.place} were confirmed;"
            f" restore the file, or remove {folder / END} to do without the missing ones"
        )

    return content


def read_end(folder: Path) -> Mark | None:
    """Read the place after the last confirmed change; None if it is unknown."""
    try:
        fields = json.loads(read_own(folder / END))
    except UsageError:
        raise
    except (OSError, ValueError, RecursionError):
        return None  # missing, or cut by a crash

    kinds = {"journal": str, "place": int, "sum": str}
    if isinstance(fields, dict) and {name: type(value) for name, value in fields.items()} == kinds:
        return Mark(**fields)

    return None


def end_is_known(folder: Path) -> bool:
    """Check whether journal.end proves that the journal holds all confirmed changes, or the journal
    needs no such proof: it has no changes, or is of an earlier version of this package.
    """
    content = read_content(folder)
    if content is None or not content.end.place or content.sums[0].startswith(BYTES):
        return True

    confirmed = read_end(folder)

    return confirmed is not None and confirmed.journal == content.name


def read_journal(folder: Path, mark: "Mark | int") -> tuple[list[Record], Mark]:
    """Return the changes after a place, and the place after the last of them.

    Raises UsageError if they are not all in the journal.
    """
    content = read_content(folder)
    where = folder / JOURNAL
    if isinstance(mark, int):  # of a version made by an earlier version of this package
        return read_from_old_place(content, mark, where)

    if content is None:
        raise UsageError(f"{where}: {MISSING}; {MEND}")
    if content.name != mark.journal:
        raise UsageError(
            f"{where}: belongs to another index ({content.name}, expected {mark.journal}); {MEND}"
        )

    before = mark.place - content.trimmed
    if not 0 <= before <= len(content.changes):
        raise UsageError(
            f"{where}: holds changes {content.trimmed} to {content.end.place}, but the index"
            f" continues from {mark.place}; {MEND}"
        )

    if content.sums[before] != mark.sum:
        raise UsageError(
            f"{where}: its first {mark.place} changes are not those that the index was built with;"
            f" {MEND}"
        )

    return content.changes[before:], content.end


def has_changes(folder: Path) -> bool:
    """Check whether there is a journal with changes, even trimmed ones; a damaged journal counts,
    because it may hold some.
    """
    try:
        content = read_content(folder)
    except Unreadable:
        raise
    except UsageError:
        return True

    return content is not None and content.end.place > 0


def collapsed(records: Sequence[Record]) -> dict[str, Item | None]:
    """Return the last state of each changed item: the item, or None if it was removed."""
    found: dict[str, Item | None] = {}

    for record in records:
        item = item_of(record["put"], JOURNAL) if "put" in record else None
        item_id = item.item_id if item else record["remove"]
        found.pop(item_id, None)
        found[item_id] = item

    return found


def begin(folder: Path) -> Mark:
    """Create an empty journal, after setting aside one that holds changes; return its place.

    Only the building process may call it.
    """
    if has_changes(folder):
        set_aside(folder)

    name = uuid.uuid4().hex[:12]
    first = sum_of("", name.encode())
    write_bytes(folder / JOURNAL, head_of(name, 0, first))
    flush_folder(folder)

    return Mark(name, 0, first)


def set_aside(folder: Path) -> None:
    """Rename a journal that is no longer used, so that people can still read it."""
    os.rename(folder / JOURNAL, folder / f"unused-{JOURNAL}-{uuid.uuid4().hex[:12]}")


class Journal:
    """Write to the journal of a folder, one process at a time.

    A change that was written survives a crash; one that could not be written leaves no trace. The
    folder is held open, so it may be renamed meanwhile. The content of the file is held in memory
    too, so that nothing is lost if somebody cuts or deletes the file.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock; raises UsageError if another process has it. `open` opens the file."""
        self.folder = folder
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock = self._file = -1
        self._confirmed = bytearray()  # the whole file
        # a line that could not be written; part of it may be at the end of the file
        self._tried = b""
        self._seen: os.stat_result | None = None  # of the file, at our last look

        try:
            with self._as_named():
                self._keep_others_out()
        except BaseException:
            self.close()
            raise

    def open(self) -> Mark:
        """Open the file and check it; return the place after its last change."""
        with self._as_named():
            content = read_content(self._place)
            if content is None:
                raise UsageError(f"{self.folder / JOURNAL}: {MISSING}; {MEND}")

            self._confirmed = bytearray(content.as_bytes())
            if content.whole:
                self._hold()
            else:  # cut by a crash, or made by an earlier version of this package
                self._replace(self._confirmed)

        self.end = content.end
        self._note_end()

        return self.end

    @property
    def _place(self) -> Path:
        """Return a path of the folder that stays valid if it is renamed."""
        return Path(f"/proc/self/fd/{self._folder}")

    @contextlib.contextmanager
    def _as_named(self) -> Iterator[None]:
        """Make errors name the folder as the user did, not by its descriptor."""
        try:
            yield
        except UsageError as error:
            told = str(error).replace(str(self._place), str(self.folder))
            raise type(error)(told) from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder / JOURNAL)) from error

    def write(self, record: Record) -> None:
        """Append a change; it is on disk when this returns.

        Raises NotKept if it could not be saved; then nothing of it remains.
        """
        text = as_text(record)
        sum_behind = sum_of(self.end.sum, text)
        line = sum_behind.encode() + b" " + text + b"\n"
        self.check()
        with self._or_not_kept():
            self._append(line)

        self._confirmed += line
        self.end = Mark(self.end.journal, self.end.place + 1, sum_behind)
        self._note_end()

    def _append(self, line: bytes) -> None:
        """Append a line to the file, whole or not at all."""
        self._tried = line

        try:
            write_all(self._file, line)
            os.fsync(self._file)
            self._seen = os.fstat(self._file)
        except OSError:
            with contextlib.suppress(OSError):  # if this fails, `check` does it later
                os.ftruncate(self._file, len(self._confirmed))
            raise

        self._tried = b""

    @contextlib.contextmanager
    def _or_not_kept(self) -> Iterator[None]:
        """Turn OSError and UsageError into NotKept."""
        try:
            with self._as_named():
                yield
        except OSError as error:
            raise NotKept(
                f"{self.folder / JOURNAL}: the change cannot be saved ({error.strerror})"
            ) from error
        except UsageError as error:
            raise NotKept(f"the change cannot be saved: {error}") from error

    def _note_end(self) -> None:
        """Record the last confirmed change; the record may lag behind the journal, but is never
        ahead of it.
        """
        told = json.dumps(dataclasses.asdict(self.end)).ljust(120).encode()
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

        with contextlib.suppress(OSError):
            handle = os.open(END, flags, 0o666, dir_fd=self._folder)
            try:
                os.pwrite(handle, told, 0)
            finally:
                os.close(handle)

    def check(self) -> None:
        """Raise NotKept unless what is written will be found, and no other process writes."""
        with self._or_not_kept():
            self._check_folder()
            if not is_file(self._lock, self._stat(WRITING)):
                self._keep_others_out()
            self._check_file()

    def _check_folder(self) -> None:
        """Raise UsageError if another folder is at our path; one that was renamed is still ours."""
        try:
            there = os.stat(self.folder)
        except FileNotFoundError:
            return

        if not is_file(self._folder, there):
            raise UsageError(
                f"{self.folder}: replaced by another folder since it was opened, so no more changes"
                " are taken; start the service again"
            )

    def _keep_others_out(self) -> None:
        """Take the lock, or take it again after its file was removed.

        Raises UsageError if another process has it.
        """
        handle = open_lock(self._place / WRITING)

        try:
            taken = take_lock(handle)
        except OSError as error:
            os.close(handle)
            raise UsageError(
                f"{self.folder / WRITING}: cannot be locked ({error.strerror}); use a disk that"
                " supports locks"
            ) from error

        if not taken:
            os.close(handle)
            raise UsageError(
                f"{self.folder}: another service with a key writes to this index; give each its own"
                " --index"
            )

        if self._lock >= 0:
            os.close(self._lock)

        self._lock = handle

    def _check_file(self) -> None:
        """Check that our file is in the folder and holds what was confirmed; restore what is gone.

        Raises UsageError if it holds anything else.
        """
        there = self._stat(JOURNAL)
        if there is None:
            log.warning("%s was removed; restored it with all changes", self.folder / JOURNAL)
            self._replace(self._confirmed)
            return

        if self._as_seen(there):
            return

        found = read_own(self._place / JOURNAL)
        ours = is_file(self._file, there)
        behind = found[len(self._confirmed) :]

        if found == self._confirmed:
            self._hold()
        elif ours and self._confirmed.startswith(found):
            log.warning("%s was cut; restored it with all changes", self.folder / JOURNAL)
            self._replace(self._confirmed)
        elif ours and found.startswith(self._confirmed) and self._tried.startswith(behind):
            os.ftruncate(self._file, len(self._confirmed))
            self._seen = os.fstat(self._file)
        else:
            raise UsageError(
                f"{self.folder / JOURNAL}: holds something other than the changes confirmed by this"
                " service; start the service again to use that file, or move it away: the next"
                " change then restores all confirmed ones"
            )

    def _as_seen(self, there: os.stat_result) -> bool:
        """Check whether the file is the one that we hold open, unchanged since our last look."""
        return (
            is_file(self._file, there)
            and there.st_size == len(self._confirmed)
            and there.st_mtime_ns == self._seen.st_mtime_ns
        )

    def _stat(self, name: str) -> os.stat_result | None:
        """Return the status of a name in the folder; None if there is no such name."""
        try:
            return os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def trim(self, place: int) -> None:
        """Drop the changes before a place, atomically for readers."""
        self.check()
        content = parse(bytes(self._confirmed), str(self.folder / JOURNAL))
        gone = place - content.trimmed
        if 0 < gone <= len(content.changes):
            with self._as_named():
                self._replace(content.without_first(gone).as_bytes())

    def _replace(self, data: bytes | bytearray) -> None:
        """Replace the content of the file; from now on it is what is confirmed."""
        write_bytes(self._place / JOURNAL, bytes(data))
        self._confirmed = bytearray(data)
        os.fsync(self._folder)
        self._hold()

    def _hold(self) -> None:
        """Open the file that is in the folder now, then close the one that was open."""
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(JOURNAL, flags, dir_fd=self._folder)
        if self._file >= 0:
            os.close(self._file)

        self._file = file
        self._seen = os.fstat(file)
        self._tried = b""

    def close(self) -> None:
        """Restore what was cut or removed meanwhile, and release file, lock and folder."""
        if self._file >= 0:
            try:
                self.check()
            except NotKept as error:
                log.error("%s", error)

        for handle in (self._file, self._lock, self._folder):
            if handle >= 0:
                os.close(handle)

        self._file = self._lock = self._folder = -1


def is_file(handle: int, there: os.stat_result | None) -> bool:
    """Check whether a stat result is of the file that a descriptor holds open."""
    return there is not None and os.path.samestat(os.fstat(handle), there)
