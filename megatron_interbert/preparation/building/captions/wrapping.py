"""Define what a file of captions is to the rest: records, whatever wraps them; and read the ones
that have a record on each line.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_interbert.data.image_names import CAPTION_NUMBER
from megatron_interbert.preparation.building.captions.text_file import read_lines
from megatron_interbert.preparation.building.captions.unknown import (
    LOOKED_AT,
    in_words,
    unknown_fields,
    with_known_names,
)

TOKEN_LINE = re.compile(r"^\S+#\S*\d\s")  # `1000.jpg#0 a man` in Flickr's token files

Placed = tuple[str, Mapping[Any, Any] | str]


@dataclass
class Wrapped:
    """Hold the records of a file.

    `records` yields (place in the file, record or what is wrong with it) anew at each call. `kind`
    is one of the formats of --captions-format, `words` says how the records are wrapped.
    """

    kind: str
    words: str
    records: Callable[[], Iterator[Placed]] = field(repr=False)
    files: int = 1  # that hold the records


def json_lines(path: str) -> Wrapped:
    """Read an object on each line, whose fields may have unknown names."""

    def records() -> Iterator[Placed]:
        for number, line in read_lines(path):
            try:
                value = json.loads(line)
                problem = "" if isinstance(value, dict) else f"a {type(value).__name__}"
            except (ValueError, RecursionError) as error:
                problem = str(error)

            yield (
                f"line {number}",
                f"is not a JSON object ({problem})" if problem else value,
            )

    words = "a JSON object on each line"
    first = (record for _, record in itertools.islice(records(), LOOKED_AT))
    meaning = unknown_fields([record for record in first if isinstance(record, Mapping)])
    if not meaning:
        return Wrapped("jsonl", words, records)

    return Wrapped(
        "jsonl",
        f"{words}, {in_words(meaning)}",
        lambda: ((place, with_known_names(record, meaning)) for place, record in records()),
    )


def token_lines(path: str) -> Wrapped:
    """Read Flickr's token files: `IMAGE.jpg#0`, a caption; flickr8k-cn has `IMAGE.jpg#zhc#0`."""

    def records() -> Iterator[Placed]:
        for number, line in read_lines(path):
            name, _, text = line.strip().partition("\t" if "\t" in line else " ")
            image = CAPTION_NUMBER.sub("", name)
            yield f"line {number}", {"image": image, "caption": text}

    return Wrapped("flickr-tokens", "lines of IMAGE#NUMBER and a caption", records)
