"""Read regions from photos by running an object detector while the store is built."""

import functools
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_interbert.data.regions import Regions
from megatron_interbert.errors import TrainingStopped
from megatron_interbert.preparation.building.choosing import load_detector
from megatron_interbert.preparation.building.detectors import Detections, Detector, DetectorChoice
from megatron_interbert.preparation.building.sources.base import Dropped, Record, SourceFacts
from megatron_interbert.preparation.building.sources.photo_files import Photo, PhotoFiles

if TYPE_CHECKING:
    from PIL.Image import Image


class PhotoSource:
    """Detect regions in photos, in the order of their files.

    Of each photo, regions with a score of at least `min_score` are kept, but at most `max_regions`
    and, if the detector gives as many, at least `min_regions`.
    """

    def __init__(
        self,
        files: PhotoFiles,
        choice: DetectorChoice,
        *,
        batch_size: int = 8,
        max_regions: int = 36,
        min_regions: int = 10,
        min_score: float = 0.2,
    ) -> None:
        self.path = files.path
        self.files = files
        self.choice = choice
        self.batch_size = batch_size
        self.max_regions = max_regions
        self.min_regions = min_regions
        self.min_score = min_score
        self._facts: SourceFacts | None = None

    def facts(self) -> SourceFacts:
        """Return the sizes and names of the detector, which this loads."""
        if self._facts is None:
            detector = load_once(self.choice)
            sizes = (detector.feature_dim, detector.num_classes)
            self._facts = SourceFacts(*sizes, "dense", detector.class_names, detector.describe())

        return self._facts

    def units(self, images_per_unit: int) -> list[Any]:
        """List the units of the files."""
        return self.files.units(images_per_unit)

    def read(self, unit: Any) -> Iterator[Record | Dropped]:
        """Yield the photos of one unit, in order.

        Detection runs in the order of their sizes, so that batches hold pictures of equal shape.
        """
        found: list[Record | Dropped | None] = []
        waiting: list[tuple[tuple[int, int], int, Photo]] = []  # size, place in `found`, photo

        for photo in self.files.photos(unit):
            size = look(photo) if isinstance(photo, Photo) else photo
            found.append(size if isinstance(size, Dropped) else None)
            if not isinstance(size, Dropped):
                waiting.append((size, len(found) - 1, photo))

        waiting.sort(key=lambda item: item[:2])
        for batch in self._decoded([(place, photo) for _, place, photo in waiting]):
            pictures = {}
            for place, photo, picture in batch:
                if isinstance(picture, Dropped):
                    found[place] = picture
                else:
                    pictures[place] = photo, picture

            for place, record in self._detect(pictures).items():
                found[place] = record

        yield from found

    def _decoded(self, photos: Sequence[tuple[int, Photo]]) -> Iterator[list["Decoded"]]:
        """Yield batches of decoded photos; a thread decodes the next one while the detector works
        on the current one.
        """
        starts = range(0, len(photos), self.batch_size)

        with ThreadPoolExecutor(1) as pool:
            ahead = [
                pool.submit(_decode, photos[start : start + self.batch_size])
                for start in starts[:1]
            ]
            for start in starts:
                following = start + self.batch_size
                if following < len(photos):
                    ahead.append(
                        pool.submit(_decode, photos[following : following + self.batch_size])
                    )

                yield ahead.pop(0).result()

    def _detect(self, pictures: dict[int, tuple[Photo, "Image"]]) -> dict[int, Record | Dropped]:
        """Return the records of decoded photos by place; if a batch fails, run its photos one at a
        time to find the one at fault.
        """
        if not pictures:
            return {}
        try:
            results = load_once(self.choice).detect([picture for _, picture in pictures.values()])
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise TrainingStopped(
                f"the detector stopped ({str(error).splitlines()[0]}); try a smaller --batch-size"
            ) from error
        except (RuntimeError, ValueError) as error:
            if len(pictures) == 1:
                (place, (photo, _)), *_ = pictures.items()
                return {place: dropped(photo, "detector failed", str(error))}

            return {
                number: record
                for place, pair in pictures.items()
                for number, record in self._detect({place: pair}).items()
            }

        return {
            place: self._record(photo, picture.size, detections)
            for (place, (photo, picture)), detections in zip(pictures.items(), results, strict=True)
        }

    def _record(self, photo: Photo, size: tuple[int, int], detections: Detections) -> Record:
        kept = detections.best(self.max_regions, self.min_regions, self.min_score)
        return Record(regions_of(photo.image_id, size, kept), photo.where, photo.captions)


@functools.lru_cache(maxsize=1)
def load_once(choice: DetectorChoice) -> Detector:
    """Return this process's detector, which all its sources share."""
    return load_detector(choice)


def look(photo: Photo) -> tuple[int, int] | Dropped:
    """Return the size of a photo from its header, or Dropped if it cannot be used."""
    from PIL import Image, UnidentifiedImageError

    try:
        with photo.open() as file, warnings.catch_warnings():
            if not file.read(1):
                return dropped(photo, "empty file")
            file.seek(0)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                return picture.size
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return dropped(
            photo, "too many pixels", f"more than {Image.MAX_IMAGE_PIXELS}; make it smaller"
        )
    except UnidentifiedImageError:
        return dropped(photo, "not a picture")
    # a decoder may raise anything on a broken file; one photo must not stop the others
    except Exception as error:
        return dropped(photo, "picture cannot be read", str(error))


Decoded = tuple[int, Photo, "Image | Dropped"]  # place, photo, its picture


def _decode(photos: Sequence[tuple[int, Photo]]) -> list[Decoded]:
    decoded: list[Decoded] = []
    for place, photo in photos:
        try:
            with photo.open() as file:
                decoded.append((place, photo, open_photo(file)))
        except Exception as error:  # a decoder may raise anything
            picture = dropped(photo, "picture cannot be decoded", str(error))
            decoded.append((place, photo, picture))

    return decoded


def dropped(photo: Photo, reason: str, details: str = "") -> Dropped:
    """Say why a photo has no record."""
    return Dropped(photo.where, photo.image_id, reason, " ".join(details.split())[:200])


def regions_of(image_id: str, size: tuple[int, int], kept: Detections) -> Regions:
    """Convert the detections of a photo of `size` (width, height) to what a store holds.

    Values beyond float16 become infinite.
    """
    with np.errstate(over="ignore"):
        features = kept.features.astype(np.float16)

    width, height = size
    return Regions(
        image_id,
        (float(width), float(height)),
        features,
        kept.boxes,
        kept.class_ids,
        kept.class_probs,
    )


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
