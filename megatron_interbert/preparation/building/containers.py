"""Read records from files that hold photos together with texts: Parquet, Arrow (Hugging Face's
`datasets`), and tar shards (WebDataset).

A record is a dictionary of fields; a photo in it is bytes. A file is read in parts, each of which
is plain JSON and can be read by any process.
"""

import itertools
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_interbert.data.image_names import PHOTO_ENDINGS
from megatron_interbert.errors import UsageError, imports_of

ENDINGS = (".parquet", ".arrow", ".tar")
BATCH = 64  # rows of Parquet in memory at a time
TEXT_MEMBERS = ("txt", "caption", "text")
GZIP = b"\x1f\x8b"
# place in the file, record or what is wrong with it
Placed = tuple[str, dict[str, Any] | str]


def is_container(path: str | Path) -> bool:
    """Check whether the name of a file is one of those that this module reads."""
    return Path(path).suffix.lower() in ENDINGS


def containers_below(folder: Path) -> list[Path]:
    """List such files below a folder, sorted; caches of `datasets` are left out."""
    found = (path for path in folder.rglob("*") if is_container(path) and path.is_file())
    return sorted(path for path in found if not path.name.startswith((".", "cache-")))


def parts(path: str | Path, rows: int) -> list[Any]:
    """List the parts of a file, of about `rows` records each where the file can be cut so."""
    with _one_line(path):
        return _reader(path).parts(Path(path), rows)


def records(path: str | Path, part: Any, photos: bool = True) -> Iterator[Placed]:
    """Yield the records of a part; without `photos`, fields that are bytes may be left out.

    Raises UsageError if the file is damaged.
    """
    with _one_line(path):
        yield from _reader(path).records(Path(path), part, photos)


@contextmanager
def _one_line(path: str | Path) -> Iterator[None]:
    """Turn whatever a damaged file can raise into a UsageError."""
    try:
        yield
    except (UsageError, GeneratorExit):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{path}: cannot be read as {Path(path).suffix[1:].lower()} ({type(error).__name__}:"
            f" {reason}); download it again"
        ) from error


class _Parquet:
    """Parts are [row group, first row in it, last + 1]."""

    def parts(self, path: Path, rows: int) -> list[list[int]]:
        with imports_of("features", "Parquet"):
            import pyarrow.parquet as parquet

        metadata = parquet.ParquetFile(path).metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

        return _pieces(sizes, rows)

    def records(self, path: Path, part: list[int], photos: bool) -> Iterator[Placed]:
        with imports_of("features", "Parquet"):
            import pyarrow.parquet as parquet

        group, start, stop = part
        file = parquet.ParquetFile(path)
        names = [name for field in file.schema_arrow for name in _columns(field, photos)]
        first = sum(file.metadata.row_group(number).num_rows for number in range(group))
        batches = file.iter_batches(BATCH, row_groups=[group], columns=names)

        yield from itertools.islice(_rows(batches, first), start, stop)


class _Arrow:
    """Parts are [record batch, first row in it, last + 1]."""

    def parts(self, path: Path, rows: int) -> list[list[int]]:
        return _pieces([batch.num_rows for batch in self._batches(path)], rows)

    def records(self, path: Path, part: list[int], photos: bool) -> Iterator[Placed]:
        number, start, stop = part
        first = 0
        for place, batch in enumerate(self._batches(path)):
            if place == number:
                piece = batch.slice(start, stop - start)
                yield from _rows(iter([piece]), first + start, photos)
                return
            first += batch.num_rows

    def _batches(self, path: Path) -> Iterator[Any]:
        """Yield the record batches, whose data stay on disk until they are used."""
        with imports_of("features", "Arrow"):
            import pyarrow

        source = pyarrow.memory_map(str(path))
        try:
            yield from pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            file = pyarrow.ipc.open_file(source)
            for number in range(file.num_record_batches):
                yield file.get_batch(number)


def _pieces(sizes: list[int], rows: int) -> list[list[int]]:
    """Cut groups of rows into pieces [group, first row in it, last + 1] of at most `rows` rows."""
    return [
        [group, start, min(start + rows, size)]
        for group, size in enumerate(sizes)
        for start in range(0, size, rows)
    ]


def _columns(field: Any, photos: bool) -> list[str]:
    """Return the names by which a field of Parquet is read; without photos, of a struct those of
    its parts that are no bytes.
    """
    import pyarrow

    if photos or not _holds_bytes(field.type):
        return [field.name]
    if not pyarrow.types.is_struct(field.type):
        return []

    return [f"{field.name}.{part.name}" for part in field.type if not _holds_bytes(part.type)]


def _without_bytes(batch: Any) -> Any:
    """Return a record batch without the bytes in it, also in structs."""
    import pyarrow

    columns = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if not _holds_bytes(field.type):
            columns[field.name] = column
        elif pyarrow.types.is_struct(field.type):
            parts = [part for part in field.type if not _holds_bytes(part.type)]
            arrays = [column.field(part.name) for part in parts]
            columns[field.name] = pyarrow.StructArray.from_arrays(arrays, fields=parts)

    return pyarrow.record_batch(columns)


def _holds_bytes(kind: Any) -> bool:
    """Check whether a field of Arrow is a photo: bytes, or a struct with bytes."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(_holds_bytes(part.type) for part in kind)

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _rows(batches: Iterator[Any], first: int, photos: bool = True) -> Iterator[Placed]:
    for batch in batches:
        if not photos:
            batch = _without_bytes(batch)
        for start in range(0, batch.num_rows, BATCH):
            for number, row in enumerate(batch.slice(start, BATCH).to_pylist(), first + start):
                if isinstance(row.get("json"), dict):  # of a WebDataset that was converted
                    row |= row.pop("json")
                yield f"row {number}", row
        first += batch.num_rows


class _Tar:
    """Parts are lists of [key, [[extension, offset, size], ..]]: members of one key are one record.

    A key ends at the first dot of a name, as in WebDataset; or at the last, if otherwise several
    photos had one key (`2.0.jpg`, `2.1.jpg`).
    """

    def parts(self, path: Path, rows: int) -> list[list[Any]]:
        with open(path, "rb") as handle:
            if handle.read(2) == GZIP:
                raise UsageError(f"{path}: is compressed; unpack it with gunzip")

        with tarfile.open(path, "r:") as archive:  # not compressed: members are read at their place
            members = [member for member in archive if member.isfile()]

        keys = _by_key(members, str.partition) or _by_key(members, str.rpartition) or {}
        items = [list(item) for item in keys.items()]

        return [items[start : start + rows] for start in range(0, len(items), rows)]

    def records(self, path: Path, part: list[Any], photos: bool) -> Iterator[Placed]:
        with open(path, "rb") as handle:
            for key, members in part:
                record: dict[str, Any] = {"__key__": key}
                problem = ""
                for extension, offset, size in members:
                    is_text = extension.rpartition(".")[2] in ("json", *TEXT_MEMBERS)
                    if photos or is_text:
                        handle.seek(offset)
                        try:
                            record |= _member(extension, handle.read(size))
                        except (ValueError, RecursionError):
                            problem = f"its {extension} is damaged"
                yield key, problem or record


def _by_key(
    members: list[tarfile.TarInfo], cut: Callable[[str, str], tuple[str, str, str]]
) -> dict[str, list[list[Any]]] | None:
    """Return [extension, offset, size] of the members of each key, where `cut` divides a name at a
    dot; None if a key has several photos.
    """
    found: dict[str, list[list[Any]]] = {}
    photos: set[str] = set()

    for member in members:
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = cut(name, ".")
        if not stem or not extension:
            continue

        key = (f"{folder}/{stem}" if folder else stem).removeprefix("./")
        if cut is str.partition and f".{extension.rpartition('.')[2].lower()}" in PHOTO_ENDINGS:
            if key in photos:
                return None
            photos.add(key)
        place = [extension.lower(), member.offset_data, member.size]
        found.setdefault(key, []).append(place)

    return found


def _member(extension: str, data: bytes) -> dict[str, Any]:
    """Return the fields of a member: those of an object in JSON, captions in a list, a text, or
    bytes.
    """
    if extension == "json":
        value = json.loads(data)
        return value if isinstance(value, dict) else {"captions": value}
    if extension.rpartition(".")[2] in TEXT_MEMBERS:
        return {"txt": data.decode("utf-8", "surrogateescape")}

    return {extension: data}


def _reader(path: str | Path) -> _Parquet | _Arrow | _Tar:
    return {".parquet": _Parquet, ".arrow": _Arrow, ".tar": _Tar}[Path(path).suffix.lower()]()
