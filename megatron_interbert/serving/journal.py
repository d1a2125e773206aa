"""What was added, changed and removed of an index's items, in order: one file for all its versions, written by one process at a time.

A line is {"put": item} or {"remove": item id}. A place in the journal is the number of bytes that were ever written before it; the first
line says how many of them have been trimmed, because no version needs them any more.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.serving.items import Item
from megatron_interbert.weights.files import flush_folder, write_text

JOURNAL, WRITING = "journal.jsonl", "writing"
Record = dict[str, Any]


def read_journal(folder: Path, place: int) -> tuple[list[Record], int]:
    """What stands from a place on, and the place behind it. Nothing, where there is no journal yet. UsageError where it does not hold the
    place. A last line that was cut by a crash is none: nobody was told that it had happened."""
    start, text = _whole_lines(folder, place)
    if not start <= place <= start + len(text):
        raise UsageError(
            f"{folder / JOURNAL}: holds bytes {start} to {start + len(text)}, but the index goes on from {place};"
            " restore the file, or begin anew from your items (--rebuild --items FILE)"
        )
    records = []
    for line in text[place - start :].split(b"\n")[:-1]:
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UsageError(
                f"{folder / JOURNAL}: a line that is no JSON (corrupt): {line[:60].decode(errors='replace')}; restore the file, or begin"
                " anew from your items (--rebuild --items FILE)"
            ) from None
    return records, start + len(text)


def journal_end(folder: Path) -> int:
    """The place behind all that stands there."""
    start, text = _whole_lines(folder, 0)
    return start + len(text)


def _whole_lines(folder: Path, otherwise: int) -> tuple[int, bytes]:
    """(the place of the first change, the changes); (`otherwise`, nothing) where there is no journal."""
    try:
        text = (folder / JOURNAL).read_bytes()
    except FileNotFoundError:
        return otherwise, b""
    head, _, rest = text[: text.rfind(b"\n") + 1].partition(b"\n")
    return json.loads(head)["trimmed"], rest


def collapsed(records: Sequence[Record]) -> dict[str, Item | None]:
    """What came last of each item: the item, or None where it was removed."""
    found: dict[str, Item | None] = {}
    for record in records:
        item = Item(**record["put"]) if "put" in record else None
        found.pop(item.item_id if item else record["remove"], None)
        found[item.item_id if item else record["remove"]] = item
    return found


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """A file that only this process holds. UsageError when another one does."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{path.parent}: {what}") from None
        yield
    finally:
        os.close(handle)


class Journal:
    """Writes to the journal of a folder, for one process at a time: what was written survives a crash, what could not is not there."""

    def __init__(self, folder: Path, place: int) -> None:
        """`place`: that of the first change, where there is no journal yet. UsageError where another process writes."""
        self.folder = folder
        self._alone = alone(folder / WRITING, "another service with a key writes to this index; give each its own --index")
        self._alone.__enter__()
        if not (folder / JOURNAL).exists():
            self._begin(place, b"")
        self._open()

    def write(self, record: Record) -> None:
        """One more line, on disk when this returns. OSError where it cannot be; then nothing of it stays."""
        before = os.fstat(self._file).st_size
        text = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            while text:
                text = text[os.write(self._file, text) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, before)
            raise

    def trim(self, place: int) -> None:
        """Forget what stands before a place. Those who read see the file before or after."""
        start, text = _whole_lines(self.folder, 0)
        if start < place <= start + len(text):
            os.close(self._file)
            try:
                self._begin(place, text[place - start :])
            finally:
                self._open()

    def close(self) -> None:
        """No more lines."""
        os.close(self._file)
        self._alone.__exit__(None, None, None)

    def _begin(self, place: int, text: bytes) -> None:
        write_text(self.folder / JOURNAL, json.dumps({"trimmed": place}) + "\n" + text.decode())

    def _open(self) -> None:
        whole = (self.folder / JOURNAL).read_bytes().rfind(b"\n") + 1
        self._file = os.open(self.folder / JOURNAL, os.O_WRONLY | os.O_APPEND)
        os.ftruncate(self._file, whole)
        flush_folder(self.folder)
