"""Read records from files that hold photos together with texts: Parquet, Arrow (Hugging Face's
`datasets`), and tar shards (WebDataset).

A record is a dictionary of fields; a photo in it is bytes. A file is read in parts, each of which
is plain JSON and can be read by any process.
"""

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_interbert.errors import UsageError, imports_of

ENDINGS = (".parquet", ".arrow", ".tar")
BATCH = 64  # rows of Parquet in memory at a time
TEXT_MEMBERS = ("txt", "caption", "text")
Placed = tuple[str, dict[str, Any]]  # place in the file, record


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
    """Parts are [first row group, last + 1]."""

    def parts(self, path: Path, rows: int) -> list[list[int]]:
        with imports_of("serve", "Parquet"):
            import pyarrow.parquet as parquet

        metadata = parquet.ParquetFile(path).metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

        return _runs(sizes, rows)

    def records(self, path: Path, part: list[int], photos: bool) -> Iterator[Placed]:
        with imports_of("serve", "Parquet"):
            import pyarrow.parquet as parquet

        file = parquet.ParquetFile(path)
        names = [name for field in file.schema_arrow for name in _columns(field, photos)]
        first = sum(file.metadata.row_group(number).num_rows for number in range(part[0]))
        batches = file.iter_batches(BATCH, row_groups=list(range(*part)), columns=names)

        yield from _rows(batches, first)


class _Arrow:
    """Parts are [first record batch, last + 1]."""

    def parts(self, path: Path, rows: int) -> list[list[int]]:
        return _runs([batch.num_rows for batch in self._batches(path)], rows)

    def records(self, path: Path, part: list[int], photos: bool) -> Iterator[Placed]:
        batches = list(self._batches(path))
        first = sum(batch.num_rows for batch in batches[: part[0]])

        yield from _rows(iter(batches[part[0] : part[1]]), first, photos)

    def _batches(self, path: Path) -> Iterator[Any]:
        """Yield the record batches, whose data stay on disk until they are used."""
        with imports_of("serve", "Arrow"):
            import pyarrow

        source = pyarrow.memory_map(str(path))
        try:
            yield from pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            file = pyarrow.ipc.open_file(source)
            for number in range(file.num_record_batches):
                yield file.get_batch(number)


def _runs(sizes: list[int], rows: int) -> list[list[int]]:
    """Group consecutive pieces into runs [first, last + 1] of about `rows` rows."""
    runs: list[list[int]] = []
    filled = rows

    for number, size in enumerate(sizes):
        if filled >= rows:
            runs.append([number, number])
            filled = 0
        runs[-1][1] = number + 1
        filled += size

    return runs


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
                yield f"row {number}", row
        first += batch.num_rows


class _Tar:
    """Parts are lists of [key, [[extension, offset, size], ..]]: members of one key are one
    record.
    """

    def parts(self, path: Path, rows: int) -> list[list[Any]]:
        with tarfile.open(path, "r:") as archive:  # not compressed: members are read at their place
            members: dict[str, list[Any]] = {}
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.isfile() and stem and extension:
                    key = f"{folder}/{stem}" if folder else stem
                    place = [extension.lower(), member.offset_data, member.size]
                    members.setdefault(key.removeprefix("./"), []).append(place)

        keys = list(members.items())

        return [
            [list(item) for item in keys[start : start + rows]]
            for start in range(0, len(keys), rows)
        ]

    def records(self, path: Path, part: list[Any], photos: bool) -> Iterator[Placed]:
        with open(path, "rb") as handle:
            for key, members in part:
                record: dict[str, Any] = {"__key__": key}
                for extension, offset, size in members:
                    is_text = extension == "json" or extension in TEXT_MEMBERS
                    if photos or is_text:
                        handle.seek(offset)
                        record |= _member(extension, handle.read(size))
                yield key, record


def _member(extension: str, data: bytes) -> dict[str, Any]:
    """Return the fields of a member: those of an object in JSON, a text, or bytes."""
    if extension == "json":
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}
    if extension in TEXT_MEMBERS:
        return {"txt": data.decode("utf-8", "surrogateescape")}

    return {extension: data}


def _reader(path: str | Path) -> _Parquet | _Arrow | _Tar:
    return {".parquet": _Parquet, ".arrow": _Arrow, ".tar": _Tar}[Path(path).suffix.lower()]()
