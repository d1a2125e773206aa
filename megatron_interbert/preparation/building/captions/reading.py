"""Open a file of captions in whatever form, and read which caption belongs to which image."""

import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building import containers
from megatron_interbert.preparation.building.captions.fields import (
    Found,
    is_telling,
    read_record,
)
from megatron_interbert.preparation.building.captions.languages import TAG, guess_language
from megatron_interbert.preparation.building.captions.layouts import whole_json
from megatron_interbert.preparation.building.captions.tables import table
from megatron_interbert.preparation.building.captions.text_file import read_lines
from megatron_interbert.preparation.building.captions.texts import Text, clean_caption
from megatron_interbert.preparation.building.captions.wrapping import (
    TOKEN_LINE,
    Placed,
    Wrapped,
    json_lines,
    token_lines,
)

JSON_LAYOUTS = ("coco", "karpathy", "sbu", "json-dict", "json")
FORMATS = ("auto", *JSON_LAYOUTS, "jsonl", "csv", "tsv", "conceptual", "flickr-tokens")
REJECTED = "rejected by its data set"  # of a complaint that is no fault
RECORDS_OF_PART = 4096
BY_LINE = ("line",)
LOOKED_AT = 1000  # records by which it is judged whether images are named, and what an example is


@dataclass
class Caption:
    """Hold a caption, and the names that its record gives to the image, most reliable first ("" for
    none), with the fields that they are from.
    """

    names: list[str]
    named_by: tuple[str, ...]
    text: str
    language: str


@dataclass
class Complaint:
    """Say what is wrong with a record: a short reason without numbers, and where it is."""

    reason: str
    where: str


class CaptionFile:
    """Read one file of captions; raises UsageError if it cannot be used as a whole.

    `kind` is one of FORMATS.
    """

    def __init__(self, path: str, kind: str = "auto") -> None:
        self.path = path
        self.wrapped = _open(path, kind)
        self.has_splits = False
        self.splits: set[str] = set()  # of the records read so far
        self.by_line = False
        self._choice = ""
        self._look()

    def _look(self) -> None:
        """Find out from the first records whether images are named by their line, whether there are
        splits, and which fields are read.
        """
        chosen: Counter[tuple[str, str]] = Counter()
        example = ""
        named = False

        for number, (_, record) in enumerate(itertools.islice(self.wrapped.records(), LOOKED_AT)):
            if isinstance(record, str):
                continue

            found = read_record(record)
            if found.other_task:
                raise UsageError(
                    f"--captions {self.path}: holds records of {found.other_task}; give captions,"
                    " which say what each image shows"
                )

            self.has_splits = self.has_splits or bool(found.split)
            if not found.texts or not (found.images or found.address or self._numbers_rows):
                continue

            named = named or bool(found.images)
            chosen[found.chosen] += 1
            name = found.images[0][0] if found.images else f"{number} (its line)"
            text = clean_caption(str(found.texts[0].text))
            example = example or f"{name[:60]} -> {text[:60]!r}"

        self.by_line = bool(chosen) and not named
        if chosen:
            (image, text), _ = chosen.most_common(1)[0]
            if self.by_line:
                what = f"{image} is only an address, which counts last" if image else "no name"
                image = f"the number of the line, from 0 ({what})"
            self._choice = f"; image: {image}; caption: {text}; first: {example}"

    @property
    def _numbers_rows(self) -> bool:
        """Check whether records without a name are named by their row, as photos there are."""
        return self.wrapped.kind == "records"

    def describe(self) -> str:
        """Return a line that says how the file is read, with an example."""
        line = f"{self.path}: {self.wrapped.words}{self._choice}"
        return line.encode("utf-8", "replace").decode("utf-8")

    def captions(self, split: str = "") -> Iterator[Caption | Complaint]:
        """Yield the captions, of some splits if `split` names them with commas between, and what is
        wrong with records of no use.
        """
        wanted = set(filter(None, split.split(",")))
        number = -1

        for place, record in self.wrapped.records():
            number += 1
            where = f"{self.path}: {place}"
            if isinstance(record, str):
                yield Complaint("not a record", f"{where}: {record}")
                continue

            found = read_record(record)
            self.splits.add(found.split)
            if wanted and found.split and found.split not in wanted:
                continue

            yield from self._of_record(found, number, where)

    def _of_record(self, found: Found, number: int, where: str) -> Iterator[Caption | Complaint]:
        if found.rejected:
            yield Complaint(REJECTED, f"{where}: {found.rejected}")
            return

        images = found.images
        named_by = found.named_by
        if not images and self.by_line and (found.address or self._numbers_rows):
            images = [_names_of_line(number, found.address)]
            named_by = BY_LINE
        if not found.texts or not images:
            missing = "caption" if not found.texts else "image"
            yield Complaint(f"no {missing} in the record", where)
            return

        for names in images:
            for text in found.texts:
                yield _checked(names, named_by, text, found, where)


def _names_of_line(number: int, address: str) -> list[str]:
    """Return the names of an image of which only the address is known.

    Downloaders name files by line number and checksum of the address, or by line number; others by
    the file name in the address, if that tells images apart.
    """
    if not address:
        return [str(number)]

    checksum = zlib.crc32(address.encode("utf-8", "surrogateescape"))

    return [f"{number}_{checksum}", address if is_telling(address) else "", str(number)]


def _checked(
    names: list[str], named_by: tuple[str, ...], text: Text, found: Found, where: str
) -> Caption | Complaint:
    where = f"{where}, image {names[0][:80]!a}"
    if not isinstance(text.text, str):
        return Complaint("caption is not text", f"{where}: {type(text.text).__name__}")

    try:
        "".join([text.text, *names]).encode("utf-8")
    except UnicodeEncodeError:
        return Complaint("text is not UTF-8", where)

    words = clean_caption(text.text)
    if not words:
        return Complaint("empty caption", where)

    return Caption(names, named_by, words, language_of(found, text))


def language_of(found: Found, text: Text) -> str:
    """Return the language tag of a caption: that of the text, of its record, or else a guess."""
    tag = text.language or found.language
    return tag if isinstance(tag, str) and TAG.match(tag) else guess_language(text.text)


def _open(path: str, kind: str) -> Wrapped:
    """Open a file as `kind`, or as what it looks like; raise UsageError if it is not that."""
    if os.path.isdir(path) or containers.is_container(path):
        return _records_with_photos(path)
    if kind == "jsonl":
        return json_lines(path)
    if kind == "flickr-tokens":
        return token_lines(path)
    if kind in JSON_LAYOUTS:
        found = whole_json(path)
        if kind not in ("json", found.kind):
            raise UsageError(
                f"--captions {path}: not a {kind} caption file but {found.words}; leave"
                " --captions-format out"
            )
        return found

    delimiter = {"tsv": "\t", "conceptual": "\t"}.get(kind, "")
    found = table(path, delimiter) if kind != "auto" else _guess(path)
    if found is None and not _start(path):
        raise UsageError(f"--captions {path}: is empty; give a file with captions")
    if found is None:
        raise UsageError(
            f"--captions {path}: starts with {_start(path)[:60]!r}, which fits no known format;"
            f" name it with --captions-format {'|'.join(FORMATS[1:])}"
        )

    return found


def _records_with_photos(path: str) -> Wrapped:
    """Read the texts of a Parquet, Arrow or tar file, or of all such files of a folder."""
    files = containers.containers_below(Path(path)) if os.path.isdir(path) else [Path(path)]
    if not files:
        raise UsageError(
            f"--captions {path}: a folder without {', '.join(containers.ENDINGS)} files; give a"
            " file of captions"
        )

    def records() -> Iterator[Placed]:
        for file in files:
            for part in containers.parts(file, RECORDS_OF_PART):
                for place, record in containers.records(file, part, photos=False):
                    if len(files) > 1 and isinstance(record, dict) and "__key__" in record:
                        # shards may number alike
                        record = {**record, "__key__": f"{file.stem}/{record['__key__']}"}
                    yield place, record

    kinds = ", ".join(sorted({file.suffix[1:] for file in files}))

    return Wrapped("records", f"records of {len(files)} {kinds} files", records, len(files))


def _start(path: str) -> str:
    """Return the first line that is not blank."""
    return next((line for _, line in read_lines(path)), "")


def _guess(path: str) -> Wrapped | None:
    """Open a file as what its first line looks like."""
    first = _start(path).lstrip()
    if first.startswith("{") and _is_object(first) and _has_more_lines(path):
        return json_lines(path)
    if first.startswith(("{", "[")):
        return whole_json(path)
    if TOKEN_LINE.match(first):
        return token_lines(path)

    return table(path)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _has_more_lines(path: str) -> bool:
    return len(list(itertools.islice(read_lines(path), 2))) > 1
