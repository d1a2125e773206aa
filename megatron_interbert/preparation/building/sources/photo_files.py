"""Find photos as people have them: in a folder, or as base64, bytes or members in other files."""

import base64
import binascii
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from megatron_interbert.data.image_names import PHOTO_ENDINGS, ImageName
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building import containers
from megatron_interbert.preparation.building.captions.fields import read_record
from megatron_interbert.preparation.building.captions.reading import REJECTED, language_of
from megatron_interbert.preparation.building.captions.tables import photo_table
from megatron_interbert.preparation.building.captions.texts import clean_caption, plain
from megatron_interbert.preparation.building.sources.base import Dropped
from megatron_interbert.preparation.building.sources.decoding import Photo
from megatron_interbert.reading import open_regular

OTHERS = (  # endings of files that lie beside photos and need not be looked into
    *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".html", ".md", ".log", ".pdf", ".db"),
    *(".npz", ".npy", ".pt", ".pkl", ".h5", ".hdf5", ".lmdb", ".mdb", ".zip", ".gz", ".bz2"),
    *(".py", ".sh", ".yaml", ".yml", ".mp4", ".sha256", ".md5", *containers.ENDINGS),
)
FIRST_BYTES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|RIFF....WEBP|GIF8[79]a|BM.{8}|II\*\0|MM\0\*|....ftypavif", re.DOTALL
)
FIRST_PHOTOS = 64  # that tell whether names tell photos apart
NO_PHOTO = "no photo in the record"


class PhotoFiles(Protocol):
    """Provide photos in units of work, which are plain JSON, as FeatureSource does."""

    path: Path

    def units(self, photos_per_unit: int) -> list[Any]:
        """List the units."""

    def photos(self, unit: Any) -> Iterator[Photo | Dropped]:
        """Yield the photos of a unit, in a fixed order."""


class FolderPhotos:
    """Provide the photos below a folder, sorted by path.

    The id of an image is its file name without ending, or as much more of its path as tells it from
    the other photos. `others` counts the files that are no photos, by ending.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.others: Counter[str] = Counter()
        self.names = sorted(self._below())
        self.ids = image_ids(self.names)

    def _below(self) -> Iterator[str]:
        """Yield the paths of photos relative to the folder, without hidden files, which some photo
        programs leave behind.
        """
        for place, folders, files in os.walk(self.path):
            folders.sort()
            for file in files:
                path = Path(place) / file
                if file.startswith("."):
                    continue
                if _is_photo(path):
                    yield path.relative_to(self.path).as_posix()
                else:
                    self.others[path.suffix.lower() or "without ending"] += 1

    def units(self, photos_per_unit: int) -> list[list[str]]:
        """List the paths of each unit, relative to the folder."""
        return [
            self.names[start : start + photos_per_unit]
            for start in range(0, len(self.names), photos_per_unit)
        ]

    def photos(self, unit: Sequence[str]) -> Iterator[Photo | Dropped]:
        """Yield the photos of a unit."""
        for name in unit:
            path = self.path / name
            yield Photo(self.ids[name], str(path), path)


def _is_photo(path: Path) -> bool:
    """Check whether a file is a photo by its ending or, for an unknown one, by its first bytes."""
    ending = path.suffix.lower()
    if ending in PHOTO_ENDINGS:
        return True
    if ending in OTHERS:
        return False

    try:
        with open_regular(path) as handle:
            return bool(FIRST_BYTES.match(handle.read(16)))
    except OSError:
        return False


def image_ids(names: Sequence[str]) -> dict[str, str]:
    """Return an id for each path: the shortest of file name, path without ending, and whole path
    that no other photo has.
    """
    stems = Counter(ImageName(name).stem for name in names)
    paths = Counter(ImageName(name).path for name in names)
    ids = {}

    for name in names:
        parts = ImageName(name)
        ids[name] = name if paths[parts.path] > 1 else parts.path
        if stems[parts.stem] == 1:
            ids[name] = parts.stem

    return ids


class ContainerPhotos:
    """Provide the photos in a Parquet, Arrow or tar file, with their captions.

    The id of an image is the most reliable name in its record, else its number in the file; that of
    all, if several of the first photos have one name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def by_number(self) -> bool:
        """Check whether different ones of the first photos have one name, as those do whose paths
        have lost their folders.
        """
        seen: dict[str, bytes] = {}
        first = (photo for unit in self.units(FIRST_PHOTOS)[:1] for photo in self._read(unit))

        return any(
            seen.setdefault(photo.image_id, photo.data) != photo.data
            for photo in itertools.islice(first, FIRST_PHOTOS)
            if isinstance(photo, Photo)
        )

    def units(self, photos_per_unit: int) -> list[Any]:
        """List the parts of the file."""
        return containers.parts(self.path, photos_per_unit)

    def photos(self, unit: Any) -> Iterator[Photo | Dropped]:
        """Yield the photos of a part."""
        yield from self._read(unit, self.by_number)

    def _read(self, unit: Any, by_number: bool = False) -> Iterator[Photo | Dropped]:
        for place, record in containers.records(self.path, unit):
            where = f"{self.path}: {place}"
            if isinstance(record, str):
                yield Dropped(where, place, record, "so its captions are unknown")
            else:
                yield photo_of_record(record, place, where, by_number)


class TablePhotos:
    """Provide the photos of a table whose cells hold them in base64 (MUGE, OFA), with captions if
    the table has them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self.fields = photo_table(str(path))

    def units(self, photos_per_unit: int) -> list[list[int]]:
        """List ranges of bytes, as long as that many lines like the first ones."""
        size = self.path.stat().st_size
        with open(self.path, "rb") as handle:
            some = [len(handle.readline()) for _ in range(8)]

        step = max(sum(some) // sum(length > 0 for length in some), 1) * photos_per_unit

        return [[start, min(start + step, size)] for start in range(0, size, step)]

    def photos(self, unit: list[int]) -> Iterator[Photo | Dropped]:
        """Yield the photos of the lines that begin in a range; lines that follow each other and
        have the same image are one photo with all their captions.
        """
        last: Photo | None = None

        for place, line in lines_of_range(self.path, unit):
            if self.header and place == 0:
                continue

            found = self._photo(line, place)
            if isinstance(found, Photo) and last and found.image_id == last.image_id:
                last.captions += found.captions
                continue
            if last:
                yield last
            last = found if isinstance(found, Photo) else None
            if isinstance(found, Dropped):
                yield found

        if last:
            yield last

    def _photo(self, line: bytes, place: int) -> Photo | Dropped:
        where = f"{self.path}: line at byte {place}"
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        cells = text.removeprefix("\ufeff" if place == 0 else "").split("\t")
        if len(cells) != len(self.fields):
            details = f"{len(cells)}, expected {len(self.fields)}"
            return Dropped(where, cells[0], "wrong number of columns", details)

        record = dict(zip(self.fields, cells, strict=True))
        try:
            data = from_base64(record.pop("photo"))
        except (binascii.Error, ValueError) as error:
            return Dropped(where, cells[0], "photo is not base64", str(error))

        return photo_of_record({**record, "photo bytes": data}, str(place), where)


def from_base64(text: str) -> bytes:
    """Decode base64 of any kind: with `-_` for `+/`, without padding, or after `data:..,`.

    Raises ValueError (binascii.Error) if it is none.
    """
    text = text.strip()
    if text.startswith("data:"):
        text = text.partition(",")[2]

    text = text.translate(str.maketrans("-_", "+/")).rstrip("=")

    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def lines_of_range(path: Path, unit: list[int]) -> Iterator[tuple[int, bytes]]:
    """Yield (place, line) of the lines of a file that begin in a range of bytes [start, stop]."""
    start, stop = unit

    with open(path, "rb", buffering=1 << 20) as handle:
        if start:
            handle.seek(start - 1)
            handle.readline()
        while (place := handle.tell()) < stop:
            line = handle.readline()
            if not line:
                return
            if line.strip():
                yield place, line


def photo_of_record(
    record: dict[str, Any], place: str, where: str, by_number: bool = False
) -> Photo | Dropped:
    """Return the photo in a record with its name, or its place if asked, and its captions; Dropped
    if there is none.
    """
    data = photo_bytes(record)
    found = read_record(record)
    named = found.images and not by_number
    image_id = found.images[0][0] if named else place.removeprefix("row ")
    if data is None:
        return Dropped(where, image_id, NO_PHOTO, ", ".join(map(str, record))[:200])

    if found.rejected:
        return Dropped(where, image_id, REJECTED, found.rejected)

    captions = [
        (clean_caption(text.text), language_of(found, text))
        for text in found.texts
        if isinstance(text.text, str) and text.text.strip()
    ]

    return Photo(image_id, where, data=data, captions=captions)


def photo_bytes(record: dict[str, Any]) -> bytes | None:
    """Return the photo in a record: bytes, bytes in a dictionary, or base64. If there are several,
    it is the first that begins as photos do.
    """
    found = []
    for name, value in record.items():
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, dict):
            value = value.get("bytes")
        if isinstance(value, str) and "base64" in plain(name):
            try:
                value = from_base64(value)
            except (binascii.Error, ValueError):
                continue
        if isinstance(value, bytes) and value:
            found.append(value)

    return next((data for data in found if FIRST_BYTES.match(data)), found[0] if found else None)


def open_photos(path: str | Path) -> list[PhotoFiles]:
    """Open the photos at a path: a folder of photos, of such files or of both, or one such file.

    Raises UsageError if there are none.
    """
    place = Path(path)
    if place.is_dir():
        folder = FolderPhotos(place)
        files: list[PhotoFiles] = [folder] if folder.names else []
        files += [ContainerPhotos(file) for file in containers.containers_below(place)]
        if files:
            return files
        seen = ", ".join(f"{count} {ending}" for ending, count in folder.others.most_common(3))
        raise UsageError(
            f"{path}: no photos there ({seen or 'it is empty'}); expected files such as"
            f" {', '.join(PHOTO_ENDINGS[:5])}, or with photos inside:"
            f" {', '.join(containers.ENDINGS)}"
        )

    if not place.exists():
        raise UsageError(f"{path}: no such file or folder, expected one with photos")
    if containers.is_container(place):
        return [ContainerPhotos(place)]
    if _is_photo(place):
        raise UsageError(f"{path}: is a single photo; give the folder that holds it")
    if place.suffix.lower() in (".zip", ".gz", ".tgz", ".bz2", ".xz"):
        raise UsageError(f"{path}: is compressed; unpack it and give the folder or file")

    return [TablePhotos(place)]
