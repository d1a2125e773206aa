"""Read tables of captions by the rules of CSV: any delimiter, with a header or without."""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.captions.columns import (
    is_header,
    is_unknown_header,
    name_columns,
)
from megatron_interbert.preparation.building.captions.fields import read_record
from megatron_interbert.preparation.building.captions.text_file import open_text
from megatron_interbert.preparation.building.captions.wrapping import Placed, Wrapped

LOOKED_AT = 200  # rows by which a table is judged
REGULAR = 0.8  # the share of them that must have the same number of columns
MOST_LINES = 50  # of one row, whose cells may hold line ends
LARGEST_CELL = 1 << 26  # characters
DELIMITERS = {  # rare ones first: where one fits, it is no accident
    "#####": "#####",  # Product1M
    "\x01": "Hive's ^A",
    "\t": "tabs",
    "|": "bars",
    ",": "commas",
    ";": "semicolons",
}
QUOTED_BETWEEN = ",;|\t"  # cells between others are written as they are
EXCEL = re.compile(r"^sep=(.)$", re.IGNORECASE)  # its note of the delimiter, above the table
# a photo in base64, by its first bytes: JPEG, PNG, WebP, GIF, BMP or TIFF
PHOTO = re.compile(
    r"^(?:data:image/\w+;base64,)?(?:[/_]9j[/_]|iVBORw0K|UklGR|R0lGOD|Qk|SUkq|TU0A)\S{32}"
)
QUOTED = re.compile(r'^"(?:[^"]|"")*"$')
Cells = list[str]


@dataclass(frozen=True)
class Layout:
    """Describe how the rows of a table are written.

    `quotes`: `"` may stand around cells. `escape`: the character before a quote inside a cell, if
    quotes are not doubled there. `fields`: the names of the columns.
    """

    delimiter: str
    quotes: bool
    escape: str = ""
    spaces: bool = False  # before the quotes around a cell
    header: bool = False
    fields: tuple[str, ...] = ()

    def rows(self, path: str, what: str = "--captions ") -> Iterator[tuple[int, Cells | str]]:
        """Yield (line number, cells or what is wrong with them) of each row that is not blank."""
        csv.field_size_limit(LARGEST_CELL)

        with open_text(path, what) as handle:
            lines = (
                (number, line)
                for number, line in enumerate(handle, 1)
                if line.strip() and not (number == 1 and EXCEL.match(line.strip()))
            )
            if not self.quotes:
                for number, line in lines:
                    yield number, [_unquoted(cell) for cell in line.split(self.delimiter)]
                return

            for number, together in _lines_of_rows(lines):
                yield from self._parsed(number, together)

    def _parsed(self, number: int, lines: Sequence[str]) -> Iterator[tuple[int, Cells | str]]:
        """Yield the rows of some lines; if they make no sense together, of each line alone."""
        try:
            rows = list(
                csv.reader(
                    lines,
                    delimiter=self.delimiter,
                    escapechar=self.escape or None,
                    skipinitialspace=self.spaces,
                    strict=True,
                )
            )
        except csv.Error as error:
            if len(lines) == 1:
                yield number, f"has quotes out of place ({error})"
            for place, line in enumerate(lines if len(lines) > 1 else ()):
                yield from self._parsed(number + place, [line])
            return

        for row in rows:
            yield number, row


def _lines_of_rows(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """Put lines together until each quote is closed; a quote that is not closed within MOST_LINES
    spoils its own line only.
    """
    pending: list[tuple[int, str]] = []

    for placed in lines:
        pending.append(placed)
        while pending:
            if sum(line.count('"') for _, line in pending) % 2 == 0:
                yield pending[0][0], [line for _, line in pending]
                pending = []
            elif len(pending) > MOST_LINES:
                yield pending[0][0], [pending[0][1]]
                rest = pending[1:]
                pending = []
                yield from _lines_of_rows(rest[:-1])
                pending = rest[-1:]
            else:
                break

    for number, line in pending:
        yield number, [line]


def _unquoted(cell: str) -> str:
    """Strip a cell, and remove quotes around it if those inside are doubled, as the rules say."""
    cell = cell.strip()
    return cell[1:-1].replace('""', '"') if QUOTED.match(cell) else cell


def table(path: str, delimiter: str = "") -> Wrapped | None:
    """Read a table; its delimiter is looked for unless given.

    Returns None if it is none: most rows have one column or different numbers of them. Raises
    UsageError if no column holds captions, or none names images.
    """
    layout = _look_at(path, [delimiter] if delimiter else list(DELIMITERS))
    if layout is None:
        return None

    def records() -> Iterator[Placed]:
        for number, row in itertools.islice(layout.rows(path), int(layout.header), None):
            yield f"line {number}", row if isinstance(row, str) else _record(layout, row)

    words = f"a table with {DELIMITERS[layout.delimiter]}"
    columns = ", ".join(name or "-" for name in layout.fields)
    words += " and a header" if layout.header else f" without a header, read as {columns}"

    return Wrapped("tsv" if layout.delimiter == "\t" else "csv", words, records)


def _record(layout: Layout, row: Cells) -> dict[str, str] | str:
    """Return the cells of a row by field, or what is wrong with the row.

    A caption in the last column may hold delimiters that should have been in quotes.
    """
    width = len(layout.fields)
    if len(row) > width and read_record({layout.fields[-1]: "text"}).texts:
        row = [*row[: width - 1], layout.delimiter.join(row[width - 1 :])]
    if len(row) != width:
        return f"has {len(row)} columns, expected {width}"

    return {name: cell for name, cell in zip(layout.fields, row, strict=True) if name}


def _look_at(path: str, delimiters: Sequence[str]) -> Layout | None:
    """Find out how a table is written: the way in which most of its first rows fit."""
    seen = []
    for layout in _candidates(_excels_delimiter(path) or delimiters):
        first = [row for _, row in itertools.islice(layout.rows(path), LOOKED_AT)]
        rows = [row for row in first if not isinstance(row, str)]
        fitting, wider = _count_fitting(rows)
        if fitting + wider >= REGULAR * len(first) and fitting:
            seen.append((fitting / len(first), layout, rows))

    problem = ""
    for _, layout, rows in sorted(seen, key=lambda candidate: -candidate[0]):
        try:
            header, fields = _fields(rows)
            return replace(layout, header=header, fields=tuple(fields))
        except UsageError as error:
            problem = problem or str(error)

    if problem:
        raise UsageError(f"--captions {path}: {problem}")

    return None


def _excels_delimiter(path: str) -> str:
    """Return the delimiter that Excel notes above a table, or ""."""
    with open_text(path) as handle:
        found = EXCEL.match(handle.readline().strip())

    return found[1] if found else ""


def _candidates(delimiters: Sequence[str]) -> Iterator[Layout]:
    for delimiter in delimiters:
        plain = Layout(delimiter, quotes=False)
        if delimiter not in QUOTED_BETWEEN:
            yield plain
            continue

        quoted = Layout(delimiter, quotes=True)
        spaced = Layout(delimiter, quotes=True, spaces=True)
        escaped = Layout(delimiter, quotes=True, escape="\\")
        # between tabs and bars, captions are mostly written as they are
        if delimiter in "\t|":
            yield from (plain, quoted, spaced, escaped)
        else:
            yield from (quoted, spaced, escaped, plain)


def _count_fitting(rows: Sequence[Cells]) -> tuple[int, int]:
    """Count the rows with as many columns as the table has, and after a header those with more,
    whose captions hold delimiters. (0, 0) for one column.
    """
    width = _width(rows)
    if width < 2:
        return 0, 0

    more = [len(row) - width for row in rows]

    return more.count(0), sum(columns > 0 for columns in more) if is_header(rows[0]) else 0


def _width(rows: Sequence[Cells]) -> int:
    """Return the number of columns: of the header, or else of most rows; 0 without rows."""
    if rows and is_header(rows[0]):
        return len(rows[0])

    return Counter(map(len, rows)).most_common(1)[0][0] if rows else 0


def _fields(rows: Sequence[Cells]) -> tuple[bool, list[str]]:
    """Return whether the first row is a header, and the fields of the columns.

    Raises UsageError if no column holds captions, or none names images.
    """
    header = is_header(rows[0])
    fields = list(rows[0]) if header else []
    texts, images = _holds(fields)

    if not (texts and images):
        body = rows[1:] if header and len(rows) > 1 else rows
        width = _width(rows)
        cells = [row[:width] for row in body if len(row) >= width]
        if header:
            needed = set() if texts else {"caption"}
            needed |= set() if images else {"image", "url"}
            fields = _completed(fields, name_columns(cells, needed, fields))
        else:
            fields = name_columns(cells)
        texts, images = _holds(fields)

    if not (texts and images):
        missing = "holds captions" if not texts else "names the images"
        raise UsageError(
            f"no column {missing} (the first row is {', '.join(rows[0])[:80]!r}); give a file with"
            " captions and the names of their images"
        )

    return header or is_unknown_header(rows, fields), fields


def _holds(fields: Sequence[str]) -> tuple[bool, bool]:
    """Return whether some fields hold captions, and whether some name images."""
    found = read_record({name: "1" for name in fields if name})
    return bool(found.texts), bool(found.images or found.address)


def _completed(fields: Sequence[str], looked: Sequence[str]) -> list[str]:
    """Name by what was seen the columns whose names in the header are unknown."""
    return [
        seen if seen and not any(_holds([name])) else name
        for name, seen in itertools.zip_longest(fields, looked, fillvalue="")
    ]


def photo_table(path: str) -> tuple[bool, list[str]]:
    """Return whether a table with tabs has a header, and the fields of its columns, among them
    `photo`, a photo in base64.

    Raises UsageError if no column holds photos.
    """
    rows = [
        row
        for _, row in itertools.islice(Layout("\t", quotes=False).rows(path, ""), LOOKED_AT)
        if not isinstance(row, str)
    ]
    photos = [
        number
        for number in range(max(map(len, rows), default=0))
        if any(PHOTO.match(row[number]) for row in rows[1:] or rows if number < len(row))
    ]
    if not photos:
        raise UsageError(
            f"{path}: no photos there; expected a folder of photos, a Parquet, Arrow or tar file,"
            " or a table with tabs, names of images and photos in base64"
        )

    header = len(rows[0]) <= photos[0] or not PHOTO.match(rows[0][photos[0]])
    body = rows[1:] if header else rows
    try:
        fields = list(rows[0]) if header else name_columns(body) or _first_is_image(body, photos[0])
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    fields[photos[0]] = "photo"

    return header, fields


def _first_is_image(rows: Sequence[Cells], photo: int) -> list[str]:
    """Name the columns of a table without texts: the first one beside the photo is its name."""
    fields = [""] * len(rows[0])
    if len(fields) > 1:
        fields[0 if photo else 1] = "image"

    return fields
