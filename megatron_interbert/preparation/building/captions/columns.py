"""Find out what the columns of a table hold: from its header, or by looking at its first rows."""

import itertools
import re
from collections.abc import Callable, Collection, Sequence

from megatron_interbert.data.image_names import CAPTION_NUMBER, ENDING
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.captions.fields import is_field, read_record
from megatron_interbert.preparation.building.captions.languages import is_language
from megatron_interbert.preparation.building.captions.texts import (
    is_nothing,
    out_of_cell,
    plain,
    texts_of,
)

ADDRESS = re.compile(r"^https?://\S+$", re.IGNORECASE)
BASE64 = re.compile(r"^[A-Za-z0-9+/_=-]{40,}$")
NUMBER = re.compile(r"^\d+(\.0)?$")
NAME = re.compile(r"^\S+$")
WORD = re.compile(r"^[^\W\d_]{1,30}([-'’][^\W\d_]+)*[.!?]?$")
LETTER = re.compile(r"[^\W\d_]")
HEADING = re.compile(r"^\s*[A-Za-z][\w /.:()-]{0,40}$")
# a word in the header of a column that may hold names of images
IMAGE_WORD = re.compile(
    r"(?:^|_)(?:im|img|image|pic|picture|photo|file|path|key|item|product|goods|sku|id)s?(?:_|$)"
)
# between categories: labels of Product1M, `Women > Bags`
CATEGORIES = re.compile(r"#;#|\s>+\s")
EAST_ASIAN = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
MOST_CAPTIONS = 10  # of one image in the mean
MOST = 0.8  # the share of its cells by which a column is judged
ALL = ("url", "caption", "image", "lang")
Row = Sequence[str]


def is_header(row: Row) -> bool:
    """Check whether the first row of a table names its columns.

    All of them must look like names, none be a file or an address, and one or more be known.
    """
    known = [cell for cell in row if is_field(cell)]
    words = all(
        HEADING.match(cell) and not (_is_file(cell) or ADDRESS.match(cell))
        for cell in row
        if cell.strip()
    )

    return bool(known) and words and (len(known) > 1 or all(len(c.split()) < 3 for c in row))


def name_columns(
    rows: Sequence[Row], needed: Collection[str] = ALL, headings: Sequence[str] | None = None
) -> list[str]:
    """Return for each column of some rows which of the `needed` things it holds: `url`, `caption`,
    `image`, `lang`; "" for none.

    Addresses and captions are found first; what remains may name the image, where columns have
    `headings` only if those speak of images. Returns [] if captions are needed and not found.
    Raises UsageError if several columns may name the image.
    """
    columns = [_cells(rows, number) for number in range(max(map(len, rows), default=0))]
    fields = ["url" if _most(cells, ADDRESS.match) else "" for cells in columns]
    if "caption" in needed:
        words = [
            0.0 if name else _wordiness(cells) for name, cells in zip(fields, columns, strict=True)
        ]
        if not any(words):
            return []
        fields[words.index(max(words))] = "caption"

    for name, rules in (("image", (_is_file, NUMBER.match, _is_name)), ("lang", (is_language,))):
        number = _first_column(columns, fields, rules, headings) if name in needed else None
        if number is not None:
            fields[number] = name

    return [field if field in needed else "" for field in fields]


def are_enough(fields: Sequence[str]) -> bool:
    """Check whether columns or fields by these names hold captions and name the images."""
    found = read_record({name: "1" for name in fields if name})
    return bool(found.texts and (found.images or found.address))


def _cells(rows: Sequence[Row], number: int) -> list[str]:
    cells = (row[number].strip() for row in rows if number < len(row))
    return [cell for cell in cells if not is_nothing(cell)]


def _most(cells: Sequence[str], rule: Callable[[str], object]) -> bool:
    return bool(cells) and sum(bool(rule(cell)) for cell in cells) >= MOST * len(cells)


def _is_file(cell: str) -> bool:
    return bool(ENDING.search(CAPTION_NUMBER.sub("", cell.strip())))


def _is_name(cell: str) -> bool:
    return bool(NAME.match(cell)) and not BASE64.match(cell) and not is_language(cell)


def _is_text(cell: str) -> bool:
    """Check whether a cell holds words: several, or one that is no code; or a list of such."""
    if cell.startswith(("[", "{")) and out_of_cell(cell) is not cell:
        texts = [text for text, _ in texts_of(cell)]
        return bool(texts) and all(isinstance(text, str) and _are_words(text) for text in texts)

    return _are_words(cell)


def _are_words(text: str) -> bool:
    words = " " in text or EAST_ASIAN.search(text) or WORD.match(text)
    return bool(words and LETTER.search(text)) and not (_is_file(text) or CATEGORIES.search(text))


def _wordiness(cells: Sequence[str]) -> float:
    """Return the mean number of words in a column of texts, letters as the tie-break (a Chinese
    character is a word); 0 for other columns.
    """
    if not _most(cells, _is_text):
        return 0.0

    words = sum(len(cell.split()) + len(EAST_ASIAN.findall(cell)) for cell in cells)
    letters = sum(len(LETTER.findall(cell)) for cell in cells)

    return (words + letters / 1000) / len(cells)


def _first_column(
    columns: Sequence[Sequence[str]],
    fields: Sequence[str],
    rules: Sequence[Callable[[str], object]],
    headings: Sequence[str] | None,
) -> int | None:
    """Return the free column that fits a rule, of the earliest rule that any fits: the first in
    which some repeat, as images with several captions do, or else the first.
    """
    free = [number for number, field in enumerate(fields) if not field]
    if any(_are_names(columns[number]) for number in free):
        free = [number for number in free if not _counts_rows(columns[number])]

    for rule in rules:
        fitting = [number for number in free if _most(columns[number], rule)]
        if headings is not None and rule != _is_file:
            fitting = [number for number in fitting if IMAGE_WORD.search(plain(headings[number]))]

        repeating = [number for number in fitting if _some_repeat(columns[number])]
        if rule == NUMBER.match and len(fitting) > 1 and len(repeating) != 1:
            names = ", ".join(str(number + 1) for number in fitting)
            raise UsageError(
                f"columns {names} hold numbers, each of which may name the image; give a first line"
                " with the names of the columns, such as id, image_id, caption"
            )
        if fitting:
            return (repeating or fitting)[0]

    return None


def _counts_rows(cells: Sequence[str]) -> bool:
    """Check whether a column counts the rows, from 0 or 1."""
    return cells[:1] in (["0"], ["1"]) and all(
        cell == str(number) for number, cell in enumerate(cells, int(cells[0]))
    )


def _are_names(cells: Sequence[str]) -> bool:
    """Check whether a column holds names that are no numbers, and that do not come again later, as
    categories do.
    """
    words = not _most(cells, NUMBER.match) and _most(cells, _is_name)
    return words and _runs(cells) == len(set(cells))


def _some_repeat(cells: Sequence[str]) -> bool:
    """Check whether a column names things that follow each other several times, but few of them
    very often: neither numbers of captions, which begin anew, nor labels.
    """
    return len(cells) / MOST_CAPTIONS <= len(set(cells)) == _runs(cells) < len(cells)


def _runs(cells: Sequence[str]) -> int:
    """Return how many runs of equal cells there are."""
    return sum(1 for _ in itertools.groupby(cells))


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
