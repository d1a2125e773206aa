"""Count what an inspection sees, in fixed memory except for some 16 bytes per image and 8 bytes per
caption, with which duplicates are found.
"""

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from megatron_interbert.data.regions import Regions
from megatron_interbert.preparation.building.sources.boxes import split_features

SHOWN = 20  # places listed for each finding; the rest are only counted
AREA_EDGES = (0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
# an address, the name of a file, or a number
NO_TEXT = re.compile(r"^(?:[a-z]+://\S+|\S+\.(?:jpe?g|png|webp|gif)|[-\d.,]+)$", re.IGNORECASE)
CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff]")
CONFIDENT = 0.2  # probability from which a region's label counts as evidence


@dataclass
class Finding:
    """Hold how often something was found, and the first places."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, count: int = 1) -> None:
        self.count += count
        if len(self.places) < SHOWN:
            self.places.append(place)


class Histogram:
    """Count integers 0 .. limit; larger ones count as `limit`."""

    def __init__(self, limit: int) -> None:
        self.counts = np.zeros(limit + 1, np.int64)

    def add(self, value: int) -> None:
        self.counts[min(value, len(self.counts) - 1)] += 1

    def quantile(self, share: float) -> int:
        """Return the smallest value that at least this share of all does not exceed; 0 if empty."""
        total = np.cumsum(self.counts)
        return int(np.searchsorted(total, share * total[-1])) if total[-1] else 0

    def summary(self) -> dict[str, Any]:
        """Return the count, the smallest and largest value, quantiles, and the bars from 0 to the
        largest value.
        """
        found = np.flatnonzero(self.counts)
        names = {"p25": 0.25, "median": 0.5, "p75": 0.75, "p99": 0.99}
        low, high = (int(found[0]), int(found[-1])) if len(found) else (0, 0)
        quantiles = {name: self.quantile(share) for name, share in names.items()}

        return {
            "count": int(self.counts.sum()),
            "least": low,
            **quantiles,
            "most": high,
            "bars": self.counts[: high + 1].tolist(),
        }


def digest(data: bytes | memoryview) -> int:
    """Return a 64-bit hash of some bytes."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def is_chinese(text: str, language: str) -> bool:
    """Check whether a caption is counted in characters, by its language tag or else its script."""
    return language.startswith("zh") or (
        not language.startswith("en") and CJK.search(text) is not None
    )


class Counts:
    """Hold all counts over images and captions.

    Features are counted as stored, boxes as the store repairs them when reading.
    """

    def __init__(self, num_classes: int, background: int | None) -> None:
        self.background = background
        self.images = self.regions = self.captions = self.unlabelled = self.background_on_top = 0
        self.regions_per_image = Histogram(512)
        self.words = Histogram(100)
        self.characters = Histogram(200)
        self.areas = np.zeros(len(AREA_EDGES) - 1, np.int64)
        self.classes = np.zeros(num_classes, np.int64)
        self.probability = 0.0
        self.least_probability = np.inf
        self.languages: dict[str, int] = {}
        self.image_hashes = array("Q")
        self.image_numbers = array("Q")
        self.caption_hashes = array("Q")
        self.findings: dict[str, Finding] = {}

    def find(self, name: str, place: str, count: int = 1) -> None:
        """Add `count` to a finding, unless it is 0."""
        if count:
            self.findings.setdefault(name, Finding()).add(place, count)

    def add_image(self, number: int, regions: Regions, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Count one image; return the top label [R] of each region, and bool [R], whether it is
        confident.
        """
        rows = len(regions.features)
        self.images += 1
        self.regions += rows
        self.regions_per_image.add(rows)
        self.find("zero_features", where, rows - int(regions.features.any(axis=1).sum()))
        self.find(
            "repeated_features", where, rows - len({row.tobytes() for row in regions.features})
        )
        self.find("boxes_in_features", where, int(split_features(regions.features)[1] is not None))
        self.image_hashes.append(digest(np.ascontiguousarray(regions.features).data.cast("B")))
        self.image_numbers.append(number)
        extent = (regions.boxes[:, 2:] - regions.boxes[:, :2]) / regions.size
        area = extent.prod(axis=1)
        self.find("no_area", where, int((area <= 0).sum()))
        self.areas += np.histogram(np.clip(area, 0, 1), AREA_EDGES)[0]

        return self._add_labels(regions)

    def _add_labels(self, regions: Regions) -> tuple[np.ndarray, np.ndarray]:
        top = regions.class_probs.argmax(axis=1)[:, None]
        labels = np.take_along_axis(regions.class_ids, top, axis=1)[:, 0]
        best = regions.class_probs.max(axis=1)
        total = regions.class_probs.sum(axis=1)
        labelled = best > 0
        self.unlabelled += int((~labelled).sum())
        np.add.at(self.classes, labels[labelled], 1)
        self.background_on_top += int((labels[labelled] == self.background).sum())
        self.probability += float(total[labelled].sum())
        self.least_probability = min(
            self.least_probability, float(total[labelled].min(initial=np.inf))
        )

        return labels, labelled & (best >= CONFIDENT)

    def add_captions(self, captions: Sequence[tuple[str, str]], where: str) -> list[str]:
        """Count the captions (text, language) of one image; return the English texts."""
        seen: set[str] = set()
        english = []

        for text, language in captions:
            chinese = is_chinese(text, language)
            words = WORD.findall(text)
            self.captions += 1
            self.languages[language or "not said"] = (
                self.languages.get(language or "not said", 0) + 1
            )
            (self.characters if chinese else self.words).add(
                len("".join(text.split())) if chinese else len(words)
            )
            self.find("empty_captions", where, not words)
            self.find("odd_captions", where, bool(NO_TEXT.match(text.strip())))
            self.find("repeated_captions", where, text.strip() in seen)
            seen.add(text.strip())
            self.caption_hashes.append(digest(text.strip().encode()))
            if language.startswith("en") or (not language and not chinese):
                english.append(text)

        return english

    def repeated_images(self) -> tuple[int, list[tuple[int, int]]]:
        """Return how many images have the features of an earlier image, and the first pairs (image,
        earlier image).
        """
        if not self.image_hashes:
            return 0, []

        hashes = np.frombuffer(self.image_hashes, np.uint64)
        numbers = np.frombuffer(self.image_numbers, np.uint64)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])

        return len(same), [
            (int(numbers[order[i + 1]]), int(numbers[order[i]])) for i in same[:SHOWN]
        ]

    def area_summary(self) -> dict[str, Any]:
        """Return the histogram of boxes by their share of the image's area: upper edges, counts."""
        return {
            "count": int(self.areas.sum()),
            "edges": list(AREA_EDGES[1:]),
            "bars": self.areas.tolist(),
        }

    def repeated_texts(self) -> int:
        """Return how many captions have a text that occurred before, for any image."""
        if not self.caption_hashes:
            return 0
        return len(self.caption_hashes) - len(
            np.unique(np.frombuffer(self.caption_hashes, np.uint64))
        )
