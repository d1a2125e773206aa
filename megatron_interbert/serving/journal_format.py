"""Define the file format of an index's journal.

The first line names the journal and says how many changes have been trimmed, because no version
needs them any more. Each further line is `<sum> {"put": item}` or `<sum> {"remove": item id}`. A
sum covers its line and all lines before it, so nothing can be altered, left out or swapped
unnoticed.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.serving.items import item_of

MISSING = "missing, and with it the changes since the index was built"
MEND = "restore the file, or begin anew from your items (--rebuild --items FILE)"
# prefix of what replaces the sum before the first change, in a journal begun by an earlier version
BYTES = "bytes "
Record = dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """Represent a place in a journal: the journal's name, the number of changes ever written before
    the place, and the sum over them.
    """

    journal: str
    place: int
    sum: str


@dataclass
class Content:
    """Hold the content of a journal: its name, its changes, and the sums before and after each.

    Unless it is `whole`, the file must be rewritten before a line is added.
    """

    name: str
    trimmed: int
    changes: list[Record]
    sums: list[str]
    lines: list[bytes]
    whole: bool

    def take(self, line: bytes, where: str) -> bool:
        """Add a line of the file; return False if its sum is wrong."""
        given, _, text = line.partition(b" ")
        expected = sum_of(self.sums[-1], text)
        if given != expected.encode():
            return False

        self.changes.append(parse_change(text, where))
        self.sums.append(expected)
        self.lines.append(line)

        return True

    @property
    def end(self) -> Mark:
        """Return the place after the last change."""
        return Mark(self.name, self.trimmed + len(self.changes), self.sums[-1])

    def without_first(self, count: int) -> "Content":
        """Return a copy without the first `count` changes."""
        return Content(
            self.name,
            self.trimmed + count,
            self.changes[count:],
            self.sums[count:],
            self.lines[count:],
            whole=True,
        )

    def as_bytes(self) -> bytes:
        """Return the bytes of a whole file with this content."""
        head = head_of(self.name, self.trimmed, self.sums[0])
        return b"".join([head, *(line + b"\n" for line in self.lines)])


def sum_of(before: str, text: bytes) -> str:
    """Compute the sum after a change from the one before it."""
    return hashlib.blake2b(before.encode() + text, digest_size=8).hexdigest()


def head_of(name: str, trimmed: int, first: str) -> bytes:
    """Return the first line of a journal; its last field is its own sum."""
    fields = {"journal": name, "trimmed": trimmed, "first": first}
    return json.dumps({**fields, "sum": sum_of("", json.dumps(fields).encode())}).encode() + b"\n"


def as_text(change: Record) -> bytes:
    """Return a change as it is written in a line."""
    return json.dumps(change, ensure_ascii=False).encode()


def parse(data: bytes, where: str) -> Content:
    """Parse a journal; raises UsageError that names a damaged line.

    A last line without its newline was cut by a crash before the change was confirmed, and is
    dropped; but if its sum is right, only the newline was lost, and it counts.
    """
    head, *rest = data.split(b"\n")
    *lines, tail = rest or [b"cut"]
    name, trimmed, first = parse_head(head, where)
    content = Content(name, trimmed, [], [first], [], whole=not tail)

    for number, line in enumerate(lines, start=2):
        if not content.take(line, f"{where}: line {number}"):
            told = line[:60].decode(errors="replace")
            raise UsageError(
                f"{where}: line {number} is not as it was written (its sum differs): {told}; {MEND}"
            )

    for line in (tail, tail[:-1]):
        if content.take(line, f"{where}: last line"):
            break

    return content


def parse_head(line: bytes, where: str) -> tuple[str, int, str]:
    """Return (name, trimmed, sum before the first change) from the first line.

    Raises UsageError, which does not quote the line, if it is damaged.
    """
    try:
        fields = json.loads(line)
        name = fields["journal"]
        trimmed = fields["trimmed"]
        first = fields["first"]
        if head_of(name, trimmed, first) == line + b"\n" and type(trimmed) is int:
            return name, trimmed, first
    except (ValueError, TypeError, KeyError, RecursionError):
        pass

    # the line is not quoted, because this may be a different file altogether
    raise UsageError(f"{where}: its first line is damaged or missing; {MEND}")


def parse_change(text: bytes, where: str) -> Record:
    """Return a change, {"put": item} or {"remove": item id}; raises UsageError for anything
    else.
    """
    try:
        change = json.loads(text)
    except (ValueError, RecursionError):
        change = None

    if isinstance(change, dict) and len(change) == 1:
        if "put" in change:
            item_of(change["put"], where)
            return change

        if isinstance(change.get("remove"), str):
            return change

    raise UsageError(f"{where}: not an item's change: {text[:60].decode(errors='replace')}; {MEND}")


class OldJournal:
    """Read a journal of an earlier version of this package: it has no name and no sums, and its
    places are numbers of bytes.
    """

    def __init__(self, trimmed: int, lines: list[bytes], where: str) -> None:
        self.trimmed = trimmed
        self.lines = lines
        self.where = where

    @classmethod
    def parse(cls, data: bytes, where: str) -> "OldJournal | None":
        """Parse such a journal; None if it is of another kind."""
        head, *lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1] or [b""]

        try:
            fields = json.loads(head)
        except (ValueError, RecursionError):
            return None

        if (
            not isinstance(fields, dict)
            or set(fields) != {"trimmed"}
            or type(fields["trimmed"]) is not int
        ):
            return None

        return cls(fields["trimmed"], lines, where)

    def renewed(self) -> Content:
        """Convert it to today's format, with a name derived from its content."""
        name = hashlib.sha256(b"\n".join(self.lines) + str(self.trimmed).encode()).hexdigest()[:12]
        first = f"{BYTES}{self.trimmed}"
        content = Content(name, 0, [], [first], [], whole=False)

        for number, text in enumerate(self.lines, start=2):
            content.changes.append(parse_change(text, f"{self.where}: line {number}"))
            content.sums.append(sum_of(content.sums[-1], text))
            content.lines.append(content.sums[-1].encode() + b" " + text)

        return content


def read_from_old_place(
    content: Content | None, place: int, where: Path
) -> tuple[list[Record], Mark]:
    """Return all changes of a journal, for a version of the index that records a number of bytes,
    and the place after them.

    Replaying changes that the version already holds does no harm, because the last change of an
    item counts. Raises UsageError if changes are missing.
    """
    if content is None:
        if place:
            raise UsageError(f"{where}: {MISSING}; {MEND}")
        return [], Mark("", 0, "")

    first = content.sums[0]
    begins = int(first.removeprefix(BYTES)) if first.startswith(BYTES) else None
    reaches_back = not place if begins is None else begins <= place
    if content.trimmed or not reaches_back:
        raise UsageError(f"{where}: begins after the place where the index continues; {MEND}")

    return content.changes, content.end
