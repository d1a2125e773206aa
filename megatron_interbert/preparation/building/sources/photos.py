"""A folder of photos as a source of regions: an object detector runs while the store is built."""

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
    """Photos below `folder`, sorted by path. The id of an image is its file name without ending.

    Kept of each photo: the regions of at least `min_score`, but never more than `max_regions`, nor
    fewer than `min_regions`.
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
        """Load the detector of this process."""
        if self._detector is None:
            self._detector = load_detector(self.choice)
        return self._detector

    def facts(self) -> SourceFacts:
        """Give sizes and names of the detector, which is loaded for it."""
        if self._facts is None:
            detector = self._load()
            sizes = (detector.feature_dim, detector.num_classes)
            self._facts = SourceFacts(*sizes, "dense", detector.class_names, detector.describe())

        return self._facts

    def units(self, images_per_unit: int) -> list[list[str]]:
        """List of paths below the folder."""
        return [
            self.names[start : start + images_per_unit]
            for start in range(0, len(self.names), images_per_unit)
        ]

    def read(self, unit: Sequence[str]) -> Iterator[Record | Dropped]:
        """Read the photos of one unit in order.

        They are detected in order of their size, so that batches can be stacked.
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
        """Give size of a photo by its first bytes, or why it is of no use."""
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
        """Open a photo.

        Links are followed: a folder of them is how people choose some of their photos.
        """
        return open_regular(self.path / name)

    def _decoded(self, names: Sequence[str]) -> Iterator[dict[str, "Image | Dropped"]]:
        """Give batches of decoded photos; a thread decodes the next one while the detector works on
        this one.
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
            except Exception as error:  # as above
                pictures[name] = self._dropped(name, "picture cannot be decoded", str(error))

        return pictures

    def _detect(self, pictures: dict[str, "Image"]) -> dict[str, Record | Dropped]:
        """Give records of decoded photos; where a batch fails, its photos one at a time, to find
        the one that is to blame.
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
        # what float16 cannot hold becomes infinite and is refused later
        with np.errstate(over="ignore"):
            features = kept.features.astype(np.float16)

        regions = Regions(
            Path(name).stem,
            (float(size[0]), float(size[1])),
            features,
            kept.boxes,
            kept.class_ids,
            kept.class_probs,
        )

        return Record(regions, str(self.path / name))

    def _dropped(self, name: str, reason: str, details: str = "") -> Dropped:
        return Dropped(
            str(self.path / name), Path(name).stem, reason, " ".join(details.split())[:200]
        )


def open_photo(path: Path | IO[bytes]) -> "Image":
    """Open a photo as RGB, turned as its EXIF data say.

    Raises whatever the decoder raises on a broken file.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        # converting these to RGB would cut off everything brighter than 255
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if picture.mode in ("I", "F"):
            raise ValueError(f"pixels of type {picture.mode}, whose range is not known")

        return picture.convert("RGB")


def _photos_below(folder: Path) -> Iterator[str]:
    """Give paths of photos relative to the folder; hidden files (those of some systems' photo
    programs) are left out.
    """
    for place, _, files in os.walk(folder):
        for file in files:
            if file.lower().endswith(ENDINGS) and not file.startswith("."):
                yield (Path(place) / file).relative_to(folder).as_posix()


def _repeated(names: Sequence[str]) -> dict[str, str]:
    """Of photos with the same name without ending, all but the first -> the first."""
    first: dict[str, str] = {}
    return {
        name: first[stem]
        for name in names
        if first.setdefault(stem := Path(name).stem, name) != name
    }
