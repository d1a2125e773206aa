"""Find out what the columns of a table hold: from its header, or by looking at its first rows."""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_interbert.data.image_names import CAPTION_NUMBER, ENDING
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.captions.fields import (
    KNOWN,
    LANGUAGE,
    SEVERAL,
    json_in_cell,
    plain,
    read_record,
    texts_of,
)

ADDRESS = re.compile(r"^https?://\S+$", re.IGNORECASE)
BASE64 = re.compile(r"^[A-Za-z0-9+/_=-]{40,}$")
NUMBER = re.compile(r"^-?[\d.,]+$")
NAME = re.compile(r"^\S+$")
WORD = re.compile(r"^[^\W\d_]{1,30}([-'’][^\W\d_]+)*[.!?]?$")
LETTER = re.compile(r"[^\W\d_]")
HEADING = re.compile(r"^\s*[A-Za-z][\w /.:()-]{0,40}$")
LABELS = "#;#"  # between the labels of a product (Product1M)
EAST_ASIAN = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
MOST_CAPTIONS = 10  # of one image in the mean
MOST = 0.8  # the share of its cells by which a column is judged
Row = Sequence[str]


def is_header(row: Row) -> bool:
    """Check whether the first row of a table names its columns.

    All of them must look like names, and one or more be known.
    """
    known = [cell for cell in row if is_field(cell)]
    words = all(HEADING.match(cell) for cell in row if cell.strip())

    return bool(known) and words and (len(known) > 1 or all(len(c.split()) < 3 for c in row))


def is_field(name: Any) -> bool:
    """Check whether a name is that of a field that we know."""
    return plain(name) in KNOWN or bool(SEVERAL.match(plain(name)))


def name_columns(rows: Sequence[Row]) -> list[str]:
    """Return for each column of some rows what it holds: `url`, `caption`, `image`, `lang`, or
    nothing known.

    Addresses and captions are found first; what remains may name the image. Returns [] if no
    column holds captions.
    """
    columns = [_cells(rows, number) for number in range(max(map(len, rows), default=0))]
    fields = ["url" if _most(cells, ADDRESS.match) else "" for cells in columns]
    words = [
        0.0 if name else _wordiness(cells) for name, cells in zip(fields, columns, strict=True)
    ]
    if not any(words):
        return []

    fields[words.index(max(words))] = "caption"
    for name, rules in (("image", (_is_file, NUMBER.match, _is_name)), ("lang", (LANGUAGE.match,))):
        number = _first_column(columns, fields, rules)
        if number is not None:
            fields[number] = name

    return fields


def are_enough(fields: Sequence[str]) -> bool:
    """Check whether columns or fields by these names hold captions and name the images."""
    found = read_record({name: "1" for name in fields if name})
    return bool(found.texts and (found.images or found.address))


def _cells(rows: Sequence[Row], number: int) -> list[str]:
    return [row[number].strip() for row in rows if number < len(row) and row[number].strip()]


def _most(cells: Sequence[str], rule: Callable[[str], object]) -> bool:
    return bool(cells) and sum(bool(rule(cell)) for cell in cells) >= MOST * len(cells)


def _is_file(cell: str) -> bool:
    return bool(ENDING.search(CAPTION_NUMBER.sub("", cell)))


def _is_name(cell: str) -> bool:
    return bool(NAME.match(cell)) and not BASE64.match(cell) and not LANGUAGE.match(cell)


def _is_text(cell: str) -> bool:
    """Check whether a cell holds words: several, or one that is no code."""
    if cell.startswith(("[", "{")) and json_in_cell(cell) is not cell:
        texts = list(texts_of(cell))
        return bool(texts) and all(isinstance(text, str) for text in texts)

    words = " " in cell or EAST_ASIAN.search(cell) or WORD.match(cell)
    return bool(words and LETTER.search(cell)) and not _is_file(cell) and LABELS not in cell


def _wordiness(cells: Sequence[str]) -> float:
    """Return the mean number of words in a column of texts, letters as the tie-break (a Chinese
    character is a word), less for texts that repeat, as categories do; 0 for other columns.
    """
    if not _most(cells, _is_text):
        return 0.0

    words = sum(len(cell.split()) + len(EAST_ASIAN.findall(cell)) for cell in cells)
    letters = sum(len(LETTER.findall(cell)) for cell in cells)

    return (words + letters / 1000) / len(cells) * len(set(cells)) / len(cells)


def _first_column(
    columns: Sequence[Sequence[str]],
    fields: Sequence[str],
    rules: Sequence[Callable[[str], object]],
) -> int | None:
    """Return the free column that fits a rule, of the earliest rule that any fits: the first in
    which some repeat, as images with several captions do, or else the first.
    """
    for rule in rules:
        fitting = [n for n, cells in enumerate(columns) if not fields[n] and _most(cells, rule)]
        repeating = [n for n in fitting if _some_repeat(columns[n])]
        if rule == NUMBER.match and len(fitting) > 1 and len(repeating) != 1:
            names = ", ".join(str(n + 1) for n in fitting)
            raise UsageError(
                f"columns {names} hold numbers, each of which may name the image; give a first line"
                " with the names of the columns, such as id, image_id, caption"
            )
        if fitting:
            return (repeating or fitting)[0]

    return None


def _some_repeat(cells: Sequence[str]) -> bool:
    """Check whether a column names things that follow each other several times, but few of them
    very often: neither numbers of captions, which begin anew, nor labels.
    """
    runs = [cell for cell, _ in itertools.groupby(cells)]
    return len(cells) / MOST_CAPTIONS <= len(set(cells)) == len(runs) < len(cells)


def is_unknown_header(rows: Sequence[Row], fields: Sequence[str]) -> bool:
    """Check whether the first row of a table, of columns known by looking, names them in words that
    are not known: where it has none of the addresses, files or numbers that all other rows have.
    """
    for number, field in enumerate(fields):
        if field not in ("url", "image") or number >= len(rows[0]):
            continue

        others = [row[number].strip() for row in rows[1:] if number < len(row)]
        for rule in (ADDRESS.match, _is_file, NUMBER.match):
            if others and all(map(rule, others)) and not rule(rows[0][number].strip()):
                return True

    return False
