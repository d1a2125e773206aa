"""Decode photos, in this process or beside it, while the detector works.

Imports no torch, so that processes that only decode start quickly and stay small.
"""

import io
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from megatron_interbert.preparation.building.interrupts import (
    end_with_parent,
    interrupts_blocked,
)
from megatron_interbert.preparation.building.sources.base import Dropped
from megatron_interbert.reading import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Photo:
    """Hold a photo before it is decoded: its file, or its bytes."""

    image_id: str
    where: str
    path: Path | None = None
    data: bytes = b""
    captions: list[tuple[str, str]] = field(default_factory=list)  # text, language

    def open(self) -> IO[bytes]:
        """Open the photo; links are followed: people select photos with them."""
        return io.BytesIO(self.data) if self.path is None else open_regular(self.path)

    def dropped(self, reason: str, details: str = "") -> Dropped:
        """Say why there are no regions of the photo."""
        return Dropped(self.where, self.image_id, reason, " ".join(details.split())[:200])


@dataclass
class Decoded:
    """Hold a batch of photos by their places in a unit: each as a picture or as what is wrong with
    it, and the seconds that decoding took.
    """

    pictures: dict[int, "Image | Dropped"]
    seconds: float


def look(photo: Photo) -> tuple[int, int] | Dropped:
    """Return the size of a photo from its header, or Dropped if it cannot be used."""
    from PIL import Image, UnidentifiedImageError

    try:
        with photo.open() as file, warnings.catch_warnings():
            if not file.read(1):
                return photo.dropped("empty file")
            file.seek(0)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                return picture.size
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return photo.dropped(
            "too many pixels", f"more than {Image.MAX_IMAGE_PIXELS}; make it smaller"
        )
    except UnidentifiedImageError:
        return photo.dropped("not a picture")
    # a decoder may raise anything on a broken file; one photo must not stop the others
    except Exception as error:
        return photo.dropped("picture cannot be read", str(error))


def open_photo(path: Path | IO[bytes]) -> "Image":
    """Open a photo as RGB, rotated as its EXIF data say.

    Raises whatever the decoder raises for a broken file.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        # converting 16-bit pixels to RGB would clip everything brighter than 255
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if picture.mode in ("I", "F"):
            raise ValueError(f"pixels of type {picture.mode}, whose range is unknown")

        return picture.convert("RGB")


def decode(photos: Sequence[tuple[int, Photo]]) -> Decoded:
    """Decode photos given with their places in a unit."""
    started = time.perf_counter()
    pictures: dict[int, Image | Dropped] = {}

    for place, photo in photos:
        try:
            with photo.open() as file:
                pictures[place] = open_photo(file)
        except Exception as error:  # a decoder may raise anything
            pictures[place] = photo.dropped("picture cannot be decoded", str(error))

    return Decoded(pictures, time.perf_counter() - started)


class Decoders:
    """Decode batches ahead of their use, in `processes` of their own or, with none, in a thread.

    The processes start with the first batch, and end with `close`.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: Executor | None = None

    def batches(self, photos: Sequence[tuple[int, Photo]], size: int) -> Iterator[Decoded]:
        """Yield batches of photos in their order, decoded."""
        pool = self._start()
        ahead: list[Future[Decoded]] = []
        starts = iter(range(0, len(photos), size))

        while True:
            while (
                len(ahead) <= max(self.processes, 1) and (start := next(starts, None)) is not None
            ):
                ahead.append(pool.submit(decode, photos[start : start + size]))
            if not ahead:
                return
            yield ahead.pop(0).result()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _start(self) -> Executor:
        if self._pool is None and self.processes:
            with interrupts_blocked():
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(
                    self.processes, context, initializer=end_with_parent
                )
        elif self._pool is None:
            self._pool = ThreadPoolExecutor(1)

        return self._pool
