"""Read regions from photos by running an object detector while the store is built."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_interbert.data.regions import Regions
from megatron_interbert.errors import TrainingStopped
from megatron_interbert.preparation.building.choosing import load_detector
from megatron_interbert.preparation.building.detectors import Detections, Detector, DetectorChoice
from megatron_interbert.preparation.building.sources.base import Dropped, Record, SourceFacts
from megatron_interbert.preparation.building.sources.decoding import (
    Decoded,
    Decoders,
    Photo,
    look,
)
from megatron_interbert.preparation.building.sources.photo_files import PhotoFiles

if TYPE_CHECKING:
    from PIL.Image import Image


class PhotoSource:
    """Detect regions in photos, in the order of their files.

    `decoders` processes decode photos beside each process that detects; 0: a thread does. Of each
    photo, regions with a score of at least `min_score` are kept, but at most `max_regions`
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
        decoders: int = 0,
    ) -> None:
        self.path = files.path
        self.files = files
        self.choice = choice
        self.batch_size = batch_size
        self.max_regions = max_regions
        self.min_regions = min_regions
        self.min_score = min_score
        self.decoders = decoders
        self.seconds: Counter[str] = Counter()  # of the last unit, by what took them
        self._facts: SourceFacts | None = None

    def facts(self) -> SourceFacts:
        """Return the sizes and names of the detector, which this loads."""
        if self._facts is None:
            detector = load_once(self.choice)
            cells = self.choice.backbone and not self.choice.name
            self._facts = SourceFacts(
                detector.feature_dim,
                detector.num_classes,
                "none" if cells else "dense",
                detector.class_names,
                detector.describe(),
            )

        return self._facts

    def units(self, images_per_unit: int) -> list[Any]:
        """List the units of the files."""
        return self.files.units(images_per_unit)

    def read(self, unit: Any) -> Iterator[Record | Dropped]:
        """Yield the photos of one unit, in order.

        Detection runs in the order of their sizes, so that batches hold pictures of equal shape.
        """
        photos = list(self.files.photos(unit))
        found: dict[int, Record | Dropped] = {}
        sizes: dict[int, tuple[int, int]] = {}

        for place, photo in enumerate(photos):
            size = look(photo) if isinstance(photo, Photo) else photo
            if isinstance(size, Dropped):
                found[place] = size
            else:
                sizes[place] = size

        places = sorted(sizes, key=lambda place: (sizes[place], place))
        waiting = [(place, photos[place]) for place in places]
        self.seconds.clear()

        for batch in self._timed("waiting for photos", waiting):
            self.seconds["decoding, beside the model"] += batch.seconds
            good = {
                p: picture
                for p, picture in batch.pictures.items()
                if not isinstance(picture, Dropped)
            }
            found |= {p: bad for p, bad in batch.pictures.items() if isinstance(bad, Dropped)}
            started = time.perf_counter()
            found |= self._detect(
                {place: (photos[place], picture) for place, picture in good.items()}
            )
            self.seconds["model"] += time.perf_counter() - started

        yield from (found[place] for place in range(len(photos)))

    def _timed(self, what: str, photos: Sequence[tuple[int, Photo]]) -> Iterator[Decoded]:
        """Yield decoded batches, and add up the seconds that each one was waited for."""
        batches = decoders_of(self.decoders).batches(photos, self.batch_size)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.seconds[what] += time.perf_counter() - started
            if batch is None:
                return
            yield batch

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
                return {place: photo.dropped("detector failed", str(error))}

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


def start_worker(first: int, decoders: int, number: int) -> Callable[[], None]:
    """Give this worker a GPU of its own where there are enough; return what ends its decoders.

    `first` is the number of the first worker of this launched process, `number` counts from it.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device((first + number) % torch.cuda.device_count())

    return decoders_of(decoders).close


@functools.lru_cache(maxsize=1)
def decoders_of(processes: int) -> Decoders:
    """Return what decodes photos for all sources of this process."""
    return Decoders(processes)


@functools.lru_cache(maxsize=1)
def load_once(choice: DetectorChoice) -> Detector:
    """Return this process's detector, which all its sources share."""
    return load_detector(choice)


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
