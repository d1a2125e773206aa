"""Read the regions of images from two stores: annotated boxes, then the boxes of a detector."""

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.region_batch import RegionBatch, read_regions
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.image_finder import find_images, image_size


class TwoStores:
    """Join the regions of an image from a store of annotated boxes and one of detected boxes, at
    most `max_regions`, annotated ones first; one of the stores may be missing.
    """

    def __init__(self, annotated: Corpus | None, detected: Corpus | None, max_regions: int) -> None:
        if annotated is None and detected is None:
            raise UsageError(
                "--data-path and --annotated-path are both missing; give a region store of the"
                " images"
            )

        self.annotated = annotated
        self.detected = detected
        self.max_regions = max_regions

    @property
    def corpora(self) -> list[Corpus]:
        """List the stores that there are, the annotated one first."""
        return [corpus for corpus in (self.annotated, self.detected) if corpus is not None]

    def apart(self) -> dict[str, "TwoStores"]:
        """Return each store that there is alone, by what figures of its kind of boxes end with."""
        alone = {}
        if self.annotated is not None:
            alone["_gt"] = TwoStores(self.annotated, None, self.max_regions)
        if self.detected is not None:
            alone["_det"] = TwoStores(None, self.detected, self.max_regions)

        return alone

    def columns_of(self, numbers: np.ndarray, both: "TwoStores") -> np.ndarray:
        """Return the numbers of images in these stores, from those in `both`, [n, stores]."""
        return numbers[:, [both.corpora.index(corpus) for corpus in self.corpora]]

    @property
    def feature_dim(self) -> int:
        """Return the size of the features."""
        return self.corpora[0].feature_dim

    def find(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return the numbers of images in each store by the names that annotations use; images that
        are missing in one of the stores are left out.
        """
        listed = list(names)
        found = [find_images(corpus, listed) for corpus in self.corpora]
        return {
            name: tuple(numbers[name] for numbers in found)
            for name in listed
            if all(name in numbers for numbers in found)
        }

    def size(self, numbers: Sequence[int]) -> tuple[float, float]:
        """Return the width and height of an image in pixels, as its first store has it."""
        return image_size(self.corpora[0], int(numbers[0]))

    def region_counts(self, numbers: np.ndarray) -> np.ndarray:
        """Return the regions that are read of images [n, stores]: int64 [n]."""
        counts = [
            corpus.region_counts[numbers[:, place]] for place, corpus in enumerate(self.corpora)
        ]
        return np.minimum(np.sum(counts, axis=0), self.max_regions)

    def most_regions(self) -> int:
        """Return the most regions that an image can have."""
        most = sum(int(corpus.region_counts.max()) for corpus in self.corpora)
        return min(most, self.max_regions)

    def read(self, numbers: np.ndarray) -> RegionBatch:
        """Read the regions of images [n, stores]; their boxes are shares of the image."""
        parts = []
        for place, corpus in enumerate(self.corpora):
            regions = read_regions(corpus, numbers[:, place], self.max_regions)
            parts.append((regions.features, regions.locations()[:, :4], regions.offsets))

        return join_regions(parts, self.max_regions)


def join_regions(
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], most: int
) -> RegionBatch:
    """Join the regions of the same images from several stores: those of the first store, then of
    the next, at most `most` per image.

    A part is (features, boxes as shares, offsets) of one store.
    """
    features = np.concatenate([part[0] for part in parts])
    boxes = np.concatenate([part[1] for part in parts])
    begin = np.cumsum([0, *(len(part[0]) for part in parts)])
    rows = []
    offsets = [0]

    for image in range(len(parts[0][2]) - 1):
        runs = [
            np.arange(part[2][image], part[2][image + 1]) + start
            for part, start in zip(parts, begin, strict=False)
        ]
        rows.append(np.concatenate(runs)[:most])
        offsets.append(offsets[-1] + len(rows[-1]))

    chosen = np.concatenate(rows)
    nothing = np.zeros((0, 1))
    sizes = np.ones((len(offsets) - 1, 2), np.float32)

    return RegionBatch(
        features[chosen],
        boxes[chosen].astype(np.float32),
        nothing,
        nothing,
        sizes,
        np.array(offsets),
    )
