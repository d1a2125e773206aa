"""Find the captions in a record, and their languages, whatever its data set calls and nests them.

A new spelling of a field is one more word in a table here.
"""

import ast
import contextlib
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_interbert.preparation.building.captions.languages import is_language

# Fields with captions: the first row of which a record has any is read, and its first field.
TEXTS = (
    ("caption", "captions", "caption_str", "caption_text", "image_caption"),
    ("sentences", "sentence", "sents", "sent", "sentf", "sentences_raw"),
    ("raw",),
    ("text", "texts", "txt"),
    ("phrase", "phrases", "regions"),
    (
        "caption_reference_description",
        "caption_alt_text_description",
        "caption_attribution_description",
    ),
    ("title", "item_title", "item_name", "product_title", "product_name", "goods_name"),
    ("query_text", "query"),
    ("comment", "comments", "description", "descriptions", "alt_text", "alttext", "alt"),
    ("annotations",),
    ("tokens",),
)
LANGUAGES = ("lang", "language", "locale", "caption_language", "language_code", "language_tag")
# caption_0, caption_1, ..; caption_en, caption_zh, ..
SEVERAL = re.compile(r"^(?:caption|text|sentence|comment|description)s?_?(\d+|[a-z]{2,3})$")
QUESTIONS = re.compile("qa|question")  # parts of a record that are no captions (LXMERT)
NOTHING = frozenset(("", r"\N", "NULL", "null", "nan", "NaN", "None", "<NA>"))  # of Hive, pandas
TOKEN = re.compile(r"^(?:[A-Za-z0-9'’-]+[.,!?;:]?|[.,!?;:\"()])$")
FEW_TOKENS = 3
JOINED = "&&"  # between the captions of OFA


class Text(NamedTuple):
    """Hold a caption, which may be anything but text in a damaged record, and the language that
    its record gives it, or "".
    """

    text: Any
    language: str = ""


@functools.lru_cache(maxsize=4096)
def plain(name: Any) -> str:
    """Return the name of a field in lower case, `_` between words: `Image Path` -> image_path."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name).strip())
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


def by_plain_name(record: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the fields of a record that hold anything, by their plain names."""
    return {plain(name): value for name, value in record.items() if not is_nothing(value)}


def is_nothing(value: Any) -> bool:
    """Check whether a value stands for a missing one."""
    if isinstance(value, str):
        return value in NOTHING

    return value is None or (isinstance(value, float) and math.isnan(value))


def is_several(name: str) -> bool:
    """Check whether a field is one of several with captions: caption_1, caption_en."""
    found = SEVERAL.match(name)
    return bool(found and (found[1].isdigit() or is_language(found[1])))


def text_fields(values: Mapping[str, Any]) -> list[str]:
    """Return the fields that hold the captions of a record: one, or several, by number or by
    language (Crossmodal-3600).
    """
    for row in TEXTS:
        for name in row:
            if name in values:
                return [name]

    several = [name for name in values if is_several(name)]

    return several or [
        name
        for name, part in values.items()
        if is_language(name) and isinstance(part, Mapping) and text_fields(by_plain_name(part))
    ]


def texts_in(values: Mapping[str, Any]) -> Iterator[Text]:
    """Yield the captions of a record, given by its plain names."""
    for name in text_fields(values):
        if name == "tokens" and isinstance(values[name], list):  # of one caption, however short
            yield Text(" ".join(map(str, values[name])))
            continue

        found = SEVERAL.match(name)
        language = found[1] if found else name
        yield from texts_of(values[name], language if is_language(language) else "")


def texts_of(value: Any, language: str = "") -> Iterator[Text]:
    """Yield the captions in a value: a text, a list of them or of records with one, the tokens of
    one, texts by language, or lists by where they come from, of which questions are left out.
    """
    value = out_of_cell(value)

    if isinstance(value, Mapping):
        yield from _texts_of_record(value, language)
    elif isinstance(value, list | tuple) and _are_tokens(value):
        yield Text(" ".join(value), language)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_of(part, language)
    elif isinstance(value, str) and JOINED in value:
        for part in value.split(JOINED):
            yield Text(part, language)
    elif not is_nothing(value):
        yield Text(value, language)


def _texts_of_record(record: Mapping[Any, Any], language: str) -> Iterator[Text]:
    values = by_plain_name(record)
    own = next((values[name] for name in LANGUAGES if isinstance(values.get(name), str)), language)

    if text_fields(values):
        for text in texts_in(values):
            yield text if text.language else Text(text.text, own)
    elif "value" in values and own != language:  # {"language_tag": .., "value": ..}
        yield from texts_of(values["value"], own)
    elif are_by_language(record):
        for name, part in record.items():
            yield from texts_of(part, name)
    elif all(isinstance(part, list | tuple) for part in record.values()):
        for name, part in record.items():
            if not QUESTIONS.search(plain(name)):
                yield from texts_of(part, language)


def are_by_language(record: Mapping[Any, Any]) -> bool:
    """Check whether a record holds texts by language: {"en": .., "id": ..}, but not {"id": ..}."""
    return bool(record) and all(map(is_language, record)) and [*record] != ["id"]


def _are_tokens(value: Sequence[Any]) -> bool:
    """Check whether a list holds the words of one caption."""
    return len(value) >= FEW_TOKENS and all(
        isinstance(part, str) and TOKEN.match(part) for part in value
    )


def out_of_cell(value: Any) -> Any:
    """Return the list or record that the cell of a table holds as JSON or as Python writes it;
    anything else as it is.
    """
    if isinstance(value, str) and value.startswith(('["', "[{", '{"', "['", "{'")):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return ast.literal_eval(value)

    return value


def clean_caption(text: str) -> str:
    """Return a caption on one line, with single spaces, and with `?` for what is no character."""
    line = " ".join(text.replace("\0", " ").split())
    return line.encode("utf-8", "replace").decode("utf-8")


def clean_captions(value: Any) -> list[str]:
    """Return the captions in a field of a record: text, bytes or a list of them; [] for others."""
    if isinstance(value, np.ndarray):
        value = value.tolist()

    texts = list(value) if isinstance(value, list | tuple) else [value]
    texts = [text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in texts]

    return [clean_caption(text) for text in texts if isinstance(text, str) and text.strip()]
