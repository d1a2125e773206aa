"""How a journal of an index stands in its file.

The first line names the journal and says how many changes have been trimmed, because no version
needs them any more. Each further line is `<sum> {"put": item}` or `<sum> {"remove": item id}`; a
sum covers the line and all before it, so nothing can be altered, left out or exchanged unseen.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.serving.items import item_of

MISSING = "missing, and with it the changes since the index was made"
MEND = "restore the file, or begin anew from your items (--rebuild --items FILE)"
# stands for the sum before the first change of a journal that an earlier version began
BYTES = "bytes "
Record = dict[str, Any]


@dataclass(frozen=True)
class Mark:
    """A place in a journal: its name, the changes ever written before the place, the sum over
    them.
    """

    journal: str
    place: int
    sum: str


@dataclass
class Content:
    """A journal as it stands on disk: its name, changes, and the sums before and behind each of
    them.

    Where it is not `whole`, it must be written anew before a line is added.
    """

    name: str
    trimmed: int
    changes: list[Record]
    sums: list[str]
    lines: list[bytes]
    whole: bool

    def take(self, line: bytes, where: str) -> bool:
        """Add a line as it stands in the file; False where its sum is not right."""
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
        """The place behind the last change."""
        return Mark(self.name, self.trimmed + len(self.changes), self.sums[-1])

    def without_first(self, count: int) -> "Content":
        """Give it without its first changes."""
        return Content(
            self.name,
            self.trimmed + count,
            self.changes[count:],
            self.sums[count:],
            self.lines[count:],
            whole=True,
        )

    def as_bytes(self) -> bytes:
        """Give it as it stands in its file when it is whole."""
        head = head_of(self.name, self.trimmed, self.sums[0])
        return b"".join([head, *(line + b"\n" for line in self.lines)])


def sum_of(before: str, text: bytes) -> str:
    """Sum the sum behind a change from the one before it."""
    return hashlib.blake2b(before.encode() + text, digest_size=8).hexdigest()


def head_of(name: str, trimmed: int, first: str) -> bytes:
    """Give the first line of a journal; its own sum is the last of its fields."""
    fields = {"journal": name, "trimmed": trimmed, "first": first}
    return json.dumps({**fields, "sum": sum_of("", json.dumps(fields).encode())}).encode() + b"\n"


def as_text(change: Record) -> bytes:
    """Give a change as it stands in a line."""
    return json.dumps(change, ensure_ascii=False).encode()


def parse(data: bytes, where: str) -> Content:
    """Take a journal apart; UsageError names a line that is not as it was written.

    A last line without its end was cut by a crash, and nobody was told that it had happened; but
    one whose sum is right has lost its end alone.
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
    """Parse (name, trimmed, sum before the first change) of the first line."""
    try:
        fields = json.loads(line)
        name = fields["journal"]
        trimmed = fields["trimmed"]
        first = fields["first"]
        if head_of(name, trimmed, first) == line + b"\n" and type(trimmed) is int:
            return name, trimmed, first
    except (ValueError, TypeError, KeyError, RecursionError):
        pass

    # What stands there is not told: the file may be another one altogether.
    raise UsageError(f"{where}: its first line is damaged or missing; {MEND}")


def parse_change(text: bytes, where: str) -> Record:
    """Parse a change, checked: {"put": item} or {"remove": item id}."""
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

    raise UsageError(f"{where}: no change of an item: {text[:60].decode(errors='replace')}; {MEND}")


class OldJournal:
    """A journal of an earlier version of this package: without name and sums, its places are
    bytes.
    """

    def __init__(self, trimmed: int, lines: list[bytes], where: str) -> None:
        self.trimmed = trimmed
        self.lines = lines
        self.where = where

    @classmethod
    def parse(cls, data: bytes, where: str) -> "OldJournal | None":
        """Take it apart; None where it is of another kind."""
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
        """Give it as one of today, by a name that follows from its content."""
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
    """Read all changes of a journal to a version that knows only a number of bytes.

    Replaying a change that the version already holds does no harm: the last change of an item
    counts.
    """
    if content is None:
        if place:
            raise UsageError(f"{where}: {MISSING}; {MEND}")
        return [], Mark("", 0, "")

    first = content.sums[0]
    begins = int(first.removeprefix(BYTES)) if first.startswith(BYTES) else None
    reaches_back = not place if begins is None else begins <= place
    if content.trimmed or not reaches_back:
        raise UsageError(f"{where}: begins behind the place where the index continues; {MEND}")

    return content.changes, content.end
