"""Read captions from the files in which data sets publish them, and look them up by image during a
build.

Every reader yields (names of the image, caption, language). Data sets name one image in several
ways (a file name, a number, a URL), so a caption may have several names, the most reliable first,
and `image_key` makes the usual spellings of one name equal. An image gets the captions in which its
name is the most reliable one: a file called 2.jpg is never taken for line 2 if both occur.
"""

import contextlib
import json
import re
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_text

CaptionRow = tuple[list[str], str, str]
IMAGE_SUFFIX = re.compile(r"\.(jpe?g|png|webp|gif|bmp|npz|npy)$", re.IGNORECASE)
COCO_NAME = re.compile(r"^COCO_(?:train|val|test)\d{4}_0*(\d+)$")
LANGUAGE = re.compile(r"^[A-Za-z]{2,3}([-_][A-Za-z0-9]{1,8})*$")
CJK = re.compile("[\u3400-\u9fff]")


def image_key(name: Any) -> str:
    """Normalise the name of an image: no folder, no suffix; COCO's names and zero-padded numbers
    become plain numbers.
    """
    key = IMAGE_SUFFIX.sub("", str(name).strip().rsplit("/", 1)[-1].split("#", 1)[0])
    coco = COCO_NAME.match(key)
    if coco:
        return coco[1]

    return (key.lstrip("0") or "0") if key.isdigit() else key


def guess_language(text: str) -> str:
    """Return `zh` for a text with Chinese characters, else `en`, for files without languages."""
    return "zh" if CJK.search(text) else "en"


def _coco(data: dict[str, Any], split: set[str]) -> Iterator[CaptionRow]:
    names = {image["id"]: image.get("file_name", image["id"]) for image in data.get("images", [])}
    for row in data["annotations"]:
        yield (
            [str(names.get(row["image_id"], row["image_id"])), str(row["image_id"])],
            row["caption"],
            "",
        )


def _karpathy(data: dict[str, Any], split: set[str]) -> Iterator[CaptionRow]:
    for image in data["images"]:
        if split and image.get("split") not in split:
            continue
        for sentence in image["sentences"]:
            yield [str(image[k]) for k in ("filename", "cocoid") if k in image], sentence["raw"], ""


def _sbu(data: dict[str, Any], split: set[str]) -> Iterator[CaptionRow]:
    for number, (url, caption) in enumerate(zip(data["image_urls"], data["captions"], strict=True)):
        yield [str(url), str(number)], caption, ""


def _dictionary(data: dict[str, Any], split: set[str]) -> Iterator[CaptionRow]:
    for image, captions in data.items():
        for caption in captions if isinstance(captions, list) else [captions]:
            yield [str(image)], caption, ""


def _json_line(record: dict[str, Any]) -> Iterator[CaptionRow]:
    """Read Flickr30K lines (sentences, img_path), MUGE and KDD queries (query_text, item_ids), or
    image_id with caption(s).
    """
    if "query_text" in record or "query" in record:
        text = record.get("query_text", record.get("query"))
        for item in record["item_ids"] if "item_ids" in record else [record["product_id"]]:
            yield [str(item)], text, record.get("lang", "")
        return

    names = [str(record[k]) for k in ("image_id", "image", "img_path", "id") if k in record]
    texts = next(
        (record[k] for k in ("captions", "sentences", "caption", "text") if k in record), None
    )
    if texts is None or not names:
        raise KeyError("image_id and caption")
    for text in texts if isinstance(texts, list) else [texts]:
        yield names[:2], text, record.get("lang", "")


def _conceptual(number: int, line: str) -> CaptionRow:
    """Read a line of Conceptual Captions: text, tab, URL.

    Downloaders name files by line number, or by line number and checksum of the URL.
    """
    text, url = line.split("\t")[:2]
    return [f"{number - 1}_{zlib.crc32(url.encode())}", str(number - 1), url], text, ""


def _plain_tsv(number: int, line: str) -> CaptionRow:
    image, text, *language = line.split("\t")[:3]
    return [image], text, language[0] if language and LANGUAGE.match(language[0]) else ""


def _tokens(number: int, line: str) -> CaptionRow:
    """Read a line of Flickr token files: `IMAGE.jpg#0`, caption; flickr8k-cn: `IMAGE.jpg#zhc#0`."""
    name, text = re.split(r"\s+", line, maxsplit=1)
    return [name], text, ""


WHOLE_FILES: dict[str, Callable[[Any, set[str]], Iterator[CaptionRow]]] = {
    "coco": _coco,
    "karpathy": _karpathy,
    "sbu": _sbu,
    "json-dict": _dictionary,
}
LINES: dict[str, Callable[[int, str], CaptionRow]] = {
    "conceptual": _conceptual,
    "tsv": _plain_tsv,
    "flickr-tokens": _tokens,
}
FORMATS = ("auto", *WHOLE_FILES, "jsonl", *LINES)


def guess_format(path: str) -> str:
    """Guess the format of a caption file from its content; raise UsageError if none fits."""
    try:
        with open(path, encoding="utf-8") as handle:
            start = handle.read(65536)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--captions {path}: cannot be read as UTF-8 text ({error})") from error

    first = start.lstrip("\ufeff").split("\n", 1)[0].rstrip("\r")
    if start.lstrip().startswith("{"):
        try:
            if isinstance(json.loads(first), dict) and len(start) > len(first) + 1:
                return "jsonl"
        except (ValueError, RecursionError):
            pass

        return _guess_json(path)

    if re.match(r"^\S+#\S*\d\s", first):
        return "flickr-tokens"
    if "\t" in first:
        return "conceptual" if re.match(r"^[^\t]+\thttps?://", first) else "tsv"

    raise UsageError(
        f"--captions {path}: starts with {first[:60]!r}, which fits no known format; name it with"
        f" --captions-format {'|'.join(FORMATS[1:])}"
    )


def _guess_json(path: str) -> str:
    keys = set(_load_json(path))
    for name, wanted in (
        ("coco", {"annotations"}),
        ("sbu", {"image_urls", "captions"}),
        ("karpathy", {"images"}),
    ):
        if wanted <= keys:
            return name

    one_line = keys & {"image_id", "query_text", "query", "img_path"} or (
        {"caption", "captions", "sentences", "text"} & keys
    )

    return "jsonl" if one_line else "json-dict"


def _load_json(path: str) -> Any:
    text = read_text(path, "--captions")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--captions {path}: not valid JSON ({error})") from error


def read_captions(path: str, kind: str = "auto", split: str = "") -> Iterator[CaptionRow | str]:
    """Yield the rows of a caption file, and for a bad row a sentence about what is wrong.

    Raises UsageError if the file as a whole cannot be used.
    """
    kind = guess_format(path) if kind == "auto" else kind
    rows = (
        _whole_file(path, kind, set(filter(None, split.split(","))))
        if kind in WHOLE_FILES
        else _by_line(path, kind)
    )
    for row in rows:
        yield row if isinstance(row, str) else _checked(row, path)


def _checked(row: CaptionRow, path: str) -> CaptionRow | str:
    keys, text, language = row
    if not keys:
        return f"{path}: a caption names no image"

    where = f"{path}: image {keys[0][:80]!a}"
    if not isinstance(text, str) or not isinstance(language, str):
        return f"{where}: caption is {type(text).__name__}, expected text"

    text = " ".join(text.replace("\0", " ").split())
    try:
        "".join([text, language, *keys]).encode("utf-8")
    except UnicodeEncodeError:
        return f"{where}: caption or name holds half characters (lone surrogates)"

    language = language if LANGUAGE.match(language) else ""

    return (keys, text, language or guess_language(text)) if text else f"{where}: empty caption"


def _whole_file(path: str, kind: str, split: set[str]) -> Iterator[CaptionRow]:
    data = _load_json(path)
    if not isinstance(data, dict):
        raise UsageError(
            f"--captions {path}: holds a {type(data).__name__}, expected the object of a {kind}"
            " file"
        )

    try:
        yield from WHOLE_FILES[kind](data, split)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"--captions {path}: not a {kind} caption file ({type(error).__name__}: {error})"
        ) from error


def _by_line(path: str, kind: str) -> Iterator[CaptionRow | str]:
    try:
        with open(path, "rb") as handle:
            for number, raw in enumerate(handle, 1):
                where = f"{path}: line {number}"
                try:
                    line = raw.decode("utf-8").strip("\r\n\ufeff")
                    if not line.strip():
                        continue

                    yield from (
                        _json_line(_object(line))
                        if kind == "jsonl"
                        else [LINES[kind](number, line)]
                    )
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    yield (
                        f"{where} is not a caption record of the {kind} format"
                        f" ({type(error).__name__}: {error})"
                    )
    except OSError as error:
        raise UsageError(f"--captions {path}: cannot be read ({error})") from error


def _object(line: str) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__}, expected an object")
    return value


SCHEMA = """
    PRAGMA journal_mode=OFF;
    PRAGMA synchronous=OFF;
    CREATE TABLE caption (text TEXT, language TEXT);
    CREATE TABLE image (key TEXT, place INTEGER, caption INTEGER);
    CREATE TABLE wanted (key TEXT PRIMARY KEY) WITHOUT ROWID;
"""


def check_kinds(files: Sequence[str], kinds: Sequence[str], split: str) -> None:
    """Raise UsageError for formats that cannot share a table, or for --split without splits."""
    if len([kind for kind in kinds if kind in ("conceptual", "sbu")]) > 1:
        raise UsageError(
            f"--captions {', '.join(files)}: these files name images by line number, so images of"
            " different files would be confused; build a store from each, then join the stores"
        )

    if split and "karpathy" not in kinds:
        raise UsageError(
            f"--split {split}: {', '.join(files)} hold no splits, which only Karpathy files have;"
            " leave --split out"
        )


class CaptionTable:
    """Look up captions by image in a file (SQLite), so that millions of them take no memory and all
    processes of a build share them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_connection": None}

    @classmethod
    def create(
        cls,
        path: Path,
        files: Sequence[str],
        kind: str = "auto",
        split: str = "",
        complain: Callable[[str], None] = print,
        wanted: Iterable[str] = (),
    ) -> "CaptionTable":
        """Read caption files and wanted image ids into a new table.

        `complain` is called with a sentence for each line that cannot be used.
        """
        path.unlink(missing_ok=True)
        kinds = [guess_format(file) if kind == "auto" else kind for file in files]
        check_kinds(files, kinds, split)

        table = cls(path)
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.executescript(SCHEMA)
            connection.executemany(
                "INSERT OR IGNORE INTO wanted VALUES (?)", ((image_key(name),) for name in wanted)
            )

            for file, known in zip(files, kinds, strict=True):
                for row in read_captions(file, known, split):
                    if isinstance(row, str):
                        complain(row)
                        continue

                    keys, text, language = row
                    caption = connection.execute(
                        "INSERT INTO caption VALUES (?, ?)", (text, language)
                    ).lastrowid
                    unique = dict.fromkeys(map(image_key, keys))
                    rows = [(key, place, caption) for place, key in enumerate(unique)]
                    connection.executemany("INSERT INTO image VALUES (?, ?, ?)", rows)

            connection.execute("CREATE INDEX image_key ON image (key, place, caption)")

        return table

    def __len__(self) -> int:
        return self._ask("SELECT count(*) FROM caption")[0][0]

    def of_image(self, image_id: str) -> list[tuple[str, str]]:
        """Return [(text, language)] of an image's captions, in the order of the files."""
        return self._ask(
            "SELECT text, language FROM image JOIN caption ON caption.rowid = image.caption WHERE"
            " key = ?1 AND place = (SELECT min(place) FROM image WHERE key = ?1) ORDER BY"
            " image.caption",
            (image_key(image_id),),
        )

    def is_wanted(self, image_id: str) -> bool:
        """Check whether an image is among the wanted ones."""
        return bool(self._ask("SELECT 1 FROM wanted WHERE key = ?", (image_key(image_id),)))

    def _ask(self, question: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if self._connection is None:
            self._connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode=ro&immutable=1", uri=True
            )

        return self._connection.execute(question, values).fetchall()
