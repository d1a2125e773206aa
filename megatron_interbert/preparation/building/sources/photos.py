"""Read regions from a folder of photos by running an object detector while the store is built."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_interbert.data.regions import Regions
from megatron_interbert.errors import TrainingStopped, UsageError
from megatron_interbert.preparation.building.choosing import load_detector
from megatron_interbert.preparation.building.detectors import Detections, Detector, DetectorChoice
from megatron_interbert.preparation.building.sources.base import Dropped, Record, SourceFacts
from megatron_interbert.reading import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class PhotoSource:
    """Detect regions in the photos below `folder`, sorted by path; the id of an image is its file
    name without ending.

    Of each photo, regions with a score of at least `min_score` are kept, but at most `max_regions`
    and, if the detector gives as many, at least `min_regions`.
    """

    def __init__(
        self,
        folder: str | Path,
        choice: DetectorChoice,
        *,
        batch_size: int = 8,
        max_regions: int = 36,
        min_regions: int = 10,
        min_score: float = 0.2,
    ) -> None:
        self.path = Path(folder)
        self.choice = choice
        self.batch_size = batch_size
        self.max_regions = max_regions
        self.min_regions = min_regions
        self.min_score = min_score
        if not self.path.is_dir():
            raise UsageError(f"{folder}: no such folder, expected one with photos")

        self.names = sorted(_photos_below(self.path))
        if not self.names:
            raise UsageError(
                f"{folder}: no photos there; expected files that end in {', '.join(ENDINGS)}"
            )

        self.repeated = _repeated(self.names)
        self._detector: Detector | None = None
        self._facts: SourceFacts | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_detector": None}

    def _load(self) -> Detector:
        """Return this process's detector, loaded on first use."""
        if self._detector is None:
            self._detector = load_detector(self.choice)
        return self._detector

    def facts(self) -> SourceFacts:
        """Return the sizes and names of the detector, which this loads."""
        if self._facts is None:
            detector = self._load()
            sizes = (detector.feature_dim, detector.num_classes)
            self._facts = SourceFacts(*sizes, "dense", detector.class_names, detector.describe())

        return self._facts

    def units(self, images_per_unit: int) -> list[list[str]]:
        """List the paths of each unit, relative to the folder."""
        return [
            self.names[start : start + images_per_unit]
            for start in range(0, len(self.names), images_per_unit)
        ]

    def read(self, unit: Sequence[str]) -> Iterator[Record | Dropped]:
        """Yield the photos of one unit, in order.

        Detection runs in the order of their sizes, so that batches hold pictures of equal shape.
        """
        found: dict[str, Record | Dropped] = {}
        sizes: dict[str, tuple[int, int]] = {}

        for name in unit:
            size = self._look(name)
            if isinstance(size, Dropped):
                found[name] = size
            else:
                sizes[name] = size

        names = sorted(sizes, key=lambda name: (sizes[name], name))
        for batch in self._decoded(names):
            pictures = {
                name: picture for name, picture in batch.items() if not isinstance(picture, Dropped)
            }
            found |= {
                name: picture for name, picture in batch.items() if isinstance(picture, Dropped)
            }
            found |= self._detect(pictures)

        yield from (found[name] for name in unit)

    def _look(self, name: str) -> tuple[int, int] | Dropped:
        """Return the size of a photo from its header, or Dropped if it cannot be used."""
        from PIL import Image, UnidentifiedImageError

        if name in self.repeated:
            return self._dropped(name, "image id seen before", f"first in {self.repeated[name]}")
        try:
            with self._open(name) as file, warnings.catch_warnings():
                if os.fstat(file.fileno()).st_size == 0:
                    return self._dropped(name, "empty file")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file) as picture:
                    return picture.size
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            return self._dropped(
                name, "too many pixels", f"more than {Image.MAX_IMAGE_PIXELS}; make it smaller"
            )
        except UnidentifiedImageError:
            return self._dropped(name, "not a picture")
        # a decoder may raise anything on a broken file; one photo must not stop the others
        except Exception as error:
            return self._dropped(name, "picture cannot be read", str(error))

    def _open(self, name: str) -> IO[bytes]:
        """Open a photo, following links: people select photos with a folder of links."""
        return open_regular(self.path / name)

    def _decoded(self, names: Sequence[str]) -> Iterator[dict[str, "Image | Dropped"]]:
        """Yield batches of decoded photos; a thread decodes the next one while the detector works
        on the current one.
        """
        starts = range(0, len(names), self.batch_size)

        with ThreadPoolExecutor(1) as pool:
            ahead = [
                pool.submit(self._decode, names[start : start + self.batch_size])
                for start in starts[:1]
            ]
            for start in starts:
                following = start + self.batch_size
                if following < len(names):
                    ahead.append(
                        pool.submit(self._decode, names[following : following + self.batch_size])
                    )

                yield ahead.pop(0).result()

    def _decode(self, names: Iterable[str]) -> dict[str, "Image | Dropped"]:
        pictures: dict[str, Image | Dropped] = {}
        for name in names:
            try:
                with self._open(name) as file:
                    pictures[name] = open_photo(file)
            except Exception as error:  # a decoder may raise anything
                pictures[name] = self._dropped(name, "picture cannot be decoded", str(error))

        return pictures

    def _detect(self, pictures: dict[str, "Image"]) -> dict[str, Record | Dropped]:
        """Return the records of decoded photos; if a batch fails, run its photos one at a time to
        find the one at fault.
        """
        if not pictures:
            return {}
        try:
            results = self._load().detect(list(pictures.values()))
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise TrainingStopped(
                f"the detector stopped ({str(error).splitlines()[0]}); try a smaller --batch-size"
            ) from error
        except (RuntimeError, ValueError) as error:
            if len(pictures) == 1:
                name = next(iter(pictures))
                return {name: self._dropped(name, "detector failed", str(error))}

            return {
                k: v
                for name, picture in pictures.items()
                for k, v in self._detect({name: picture}).items()
            }

        return {
            name: self._record(name, pictures[name].size, d)
            for name, d in zip(pictures, results, strict=True)
        }

    def _record(self, name: str, size: tuple[int, int], detections: Detections) -> Record:
        kept = detections.best(self.max_regions, self.min_regions, self.min_score)
        return Record(regions_of(Path(name).stem, size, kept), str(self.path / name))

    def _dropped(self, name: str, reason: str, details: str = "") -> Dropped:
        return Dropped(
            str(self.path / name), Path(name).stem, reason, " ".join(details.split())[:200]
        )


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


def _photos_below(folder: Path) -> Iterator[str]:
    """Yield the paths of photos relative to the folder, without hidden files, which some photo
    programs leave behind.
    """
    for place, _, files in os.walk(folder):
        for file in files:
            if file.lower().endswith(ENDINGS) and not file.startswith("."):
                yield (Path(place) / file).relative_to(folder).as_posix()


def _repeated(names: Sequence[str]) -> dict[str, str]:
    """Map each photo whose name without ending has occurred before to the first such photo."""
    first: dict[str, str] = {}
    return {
        name: first[stem]
        for name in names
        if first.setdefault(stem := Path(name).stem, name) != name
    }
