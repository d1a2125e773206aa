"""What was added, changed and removed of an index's items, in order: one file for all its versions.

A version of the index remembers the `Mark` behind the last change that is in it, and journal.end
the last one that was confirmed.
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
END = "journal.end"  # the place behind the last change that was confirmed
log = logging.getLogger("megatron_interbert.serving")


class NotKept(RuntimeError):
    """A change that could not be written down, and so did not happen."""


def read_content(folder: Path) -> Content | None:
    """Read the journal of an index; None where there is none. UsageError where it is damaged."""
    path = folder / JOURNAL
    confirmed = read_end(folder)  # first: a writer may confirm a change while we read

    try:
        data = read_own(path)
    except OSError:
        return None

    old = OldJournal.parse(data, str(path))
    content = old.renewed() if old else parse(data, str(path))
    if confirmed and confirmed.journal == content.name and confirmed.place > content.end.place:
        raise UsageError(
            f"{path}: ends with change {content.end.place}, but {confirmed.place} were confirmed;"
            f" restore the file, or remove {folder / END} to do without the others"
        )

    return content


def read_end(folder: Path) -> Mark | None:
    """Read the place behind the last change that was confirmed; None where it is not told."""
    try:
        fields = json.loads(read_own(folder / END))
    except UsageError:
        raise
    except (OSError, ValueError, RecursionError):
        return None  # there is none, or a crash has cut it

    kinds = {"journal": str, "place": int, "sum": str}
    if isinstance(fields, dict) and {name: type(value) for name, value in fields.items()} == kinds:
        return Mark(**fields)

    return None


def end_is_known(folder: Path) -> bool:
    """Tell whether it can be told that all confirmed changes are in the journal of an index, or it
    holds none.
    """
    content = read_content(folder)
    if content is None or not content.end.place or content.sums[0].startswith(BYTES):
        return True

    confirmed = read_end(folder)

    return confirmed is not None and confirmed.journal == content.name


def read_journal(folder: Path, mark: "Mark | int") -> tuple[list[Record], Mark]:
    """Read the changes from a place on, and the place behind them.

    UsageError where they are not all there.
    """
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
            f"{where}: holds changes {content.trimmed} to {content.end.place}, but the index goes"
            f" on from {mark.place}; {MEND}"
        )

    if content.sums[before] != mark.sum:
        raise UsageError(
            f"{where}: its first {mark.place} changes are not those that the index was made with;"
            f" {MEND}"
        )

    return content.changes[before:], content.end


def has_changes(folder: Path) -> bool:
    """Tell whether a journal is there that says that something was ever changed.

    A damaged one may.
    """
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
    """Make a journal without changes; by the process that builds.

    One that holds changes is set aside.
    """
    if has_changes(folder):
        set_aside(folder)

    name = uuid.uuid4().hex[:12]
    first = sum_of("", name.encode())
    write_bytes(folder / JOURNAL, head_of(name, 0, first))
    flush_folder(folder)

    return Mark(name, 0, first)


def set_aside(folder: Path) -> None:
    """Rename a journal that is not used any more: a person can still read it."""
    os.rename(folder / JOURNAL, folder / f"unused-{JOURNAL}-{uuid.uuid4().hex[:12]}")


class Journal:
    """Writes to the journal of a folder, one process at a time.

    What was written survives a crash, what could not be is not there. The folder may be renamed
    meanwhile: it is held open. What was confirmed is held in memory too, as it stands in the file,
    so that somebody who cuts or deletes the file takes nothing away.
    """

    def __init__(self, folder: Path) -> None:
        """Keep other writers out; UsageError where there is one. The file is opened by `open`."""
        self.folder = folder
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock = self._file = -1
        self._confirmed = bytearray()  # all of the file
        # a line that could not be written: some of it may stand behind the others
        self._tried = b""
        self._seen: os.stat_result | None = None  # the file after our last look at it

        try:
            with self._as_named():
                self._keep_others_out()
        except BaseException:
            self.close()
            raise

    def open(self) -> Mark:
        """Open the file and check it; the place behind its last change."""
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
        """The folder, whatever its name is now."""
        return Path(f"/proc/self/fd/{self._folder}")

    @contextlib.contextmanager
    def _as_named(self) -> Iterator[None]:
        """Have errors name the folder as the user did, not as it is held."""
        try:
            yield
        except UsageError as error:
            told = str(error).replace(str(self._place), str(self.folder))
            raise type(error)(told) from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder / JOURNAL)) from error

    def write(self, record: Record) -> None:
        """Append a change, on disk when this returns.

        NotKept where it cannot be; then nothing of it stays.
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
        """Add a line to the file, or nothing."""
        self._tried = line

        try:
            write_all(self._file, line)
            os.fsync(self._file)
            self._seen = os.fstat(self._file)
        except OSError:
            with contextlib.suppress(OSError):  # else before the next change
                os.ftruncate(self._file, len(self._confirmed))
            raise

        self._tried = b""

    @contextlib.contextmanager
    def _or_not_kept(self) -> Iterator[None]:
        """Make NotKept of what a system or a file refuses."""
        try:
            with self._as_named():
                yield
        except OSError as error:
            raise NotKept(
                f"{self.folder / JOURNAL}: the change cannot be kept ({error.strerror})"
            ) from error
        except UsageError as error:
            raise NotKept(f"the change cannot be kept: {error}") from error

    def _note_end(self) -> None:
        """Remember what was confirmed; it may lag behind the journal and never be ahead of it."""
        told = json.dumps(dataclasses.asdict(self.end)).ljust(120).encode()
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

        with contextlib.suppress(OSError):
            handle = os.open(END, flags, 0o666, dir_fd=self._folder)
            try:
                os.pwrite(handle, told, 0)
            finally:
                os.close(handle)

    def check(self) -> None:
        """See that what is written will be found, and that nobody else writes.

        NotKept where it is not so.
        """
        with self._or_not_kept():
            self._check_folder()
            if not is_file(self._lock, self._stat(WRITING)):
                self._keep_others_out()
            self._check_file()

    def _check_folder(self) -> None:
        """Raise UsageError where another folder lies in the place of ours; one that was renamed is
        still ours.
        """
        try:
            there = os.stat(self.folder)
        except FileNotFoundError:
            return

        if not is_file(self._folder, there):
            raise UsageError(
                f"{self.folder}: another folder is there than the one that was opened, which takes"
                " no more changes; start the service again"
            )

    def _keep_others_out(self) -> None:
        """Take the lock, again where somebody has removed its file.

        UsageError where another process has it.
        """
        handle = open_lock(self._place / WRITING)

        try:
            taken = take_lock(handle)
        except OSError as error:
            os.close(handle)
            raise UsageError(
                f"{self.folder / WRITING}: cannot be locked ({error.strerror}); use a disk with"
                " locks"
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
        """See that our file is there, by its name, and holds what was confirmed; put back what is
        gone.

        UsageError where it holds anything else.
        """
        there = self._stat(JOURNAL)
        if there is None:
            log.warning("%s was removed; it is put back with all changes", self.folder / JOURNAL)
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
            log.warning("%s was cut; it is put back with all changes", self.folder / JOURNAL)
            self._replace(self._confirmed)
        elif ours and found.startswith(self._confirmed) and self._tried.startswith(behind):
            os.ftruncate(self._file, len(self._confirmed))
            self._seen = os.fstat(self._file)
        else:
            raise UsageError(
                f"{self.folder / JOURNAL}: holds something else than the changes that were"
                " confirmed here; start this service again to use that file, or move it away to"
                " continue without it: the next change then puts back all that were confirmed here"
            )

    def _as_seen(self, there: os.stat_result) -> bool:
        """Tell whether the file is the one that we hold, and nobody has written to it since."""
        return (
            is_file(self._file, there)
            and there.st_size == len(self._confirmed)
            and there.st_mtime_ns == self._seen.st_mtime_ns
        )

    def _stat(self, name: str) -> os.stat_result | None:
        """Look at what has a name in the folder; None where nothing has."""
        try:
            return os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def trim(self, place: int) -> None:
        """Forget the changes before a place. Those who read see the file before or after."""
        self.check()
        content = parse(bytes(self._confirmed), str(self.folder / JOURNAL))
        gone = place - content.trimmed
        if 0 < gone <= len(content.changes):
            with self._as_named():
                self._replace(content.without_first(gone).as_bytes())

    def _replace(self, data: bytes | bytearray) -> None:
        """Put other bytes in the place of the file's: those that are confirmed from now on."""
        write_bytes(self._place / JOURNAL, bytes(data))
        self._confirmed = bytearray(data)
        os.fsync(self._folder)
        self._hold()

    def _hold(self) -> None:
        """Open the file that is there; what was open stays so until then."""
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(JOURNAL, flags, dir_fd=self._folder)
        if self._file >= 0:
            os.close(self._file)

        self._file = file
        self._seen = os.fstat(file)
        self._tried = b""

    def close(self) -> None:
        """No more changes. What was cut or removed meanwhile is put back."""
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
    """Tell whether something that was looked at is what a descriptor holds."""
    return there is not None and os.path.samestat(os.fstat(handle), there)
