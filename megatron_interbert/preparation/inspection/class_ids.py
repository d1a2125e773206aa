"""Detect shifted class ids, from how well class names fit captions, or places in the image; and
captions that are of other images, if class names fit them no better than by chance.

Images are added one at a time to sums of fixed size. Each score is compared with what chance would
give, so frequent words do not win.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

SHIFTS = (-2, -1, 0, 1, 2)
CLEAR = 4.0  # standard deviations above chance that count as evidence
LEAST_IMAGES = 5
# In a large store words that often occur together (street, car) match clearly more often than by
# chance too, but not by a large factor.
LEAST_LIFT = 1.5
USUAL_LIFT = 2.5  # of names in the captions of their own image, at least (4.6 in 20 real images)
IRREGULAR = {
    "men": "man",
    "women": "woman",
    "people": "person",
    "children": "child",
    "feet": "foot",
    "leaves": "leaf",
}
WORD = re.compile(r"[a-z]+")
# Class names of things that are usually high or low in an image.
HIGH = frozenset(
    {
        "sky",
        "cloud",
        "ceiling",
        "ceiling fan",
        "chandelier",
        "roof",
        "kite",
        "airplane",
        "plane",
        "light fixture",
    }
)
LOW = frozenset(
    {
        "floor",
        "ground",
        "grass",
        "road",
        "street",
        "shoe",
        "sneaker",
        "sand",
        "rug",
        "carpet",
        "sidewalk",
        "pavement",
        "foot",
    }
    | {
        "boot",
        "wheel",
        "tire",
        "skateboard",
        "tile floor",
        "hardwood floor",
        "curb",
        "driveway",
        "sandal",
        "ski",
        "hoof",
    }
    | {"crosswalk", "paw", "dirt", "skate"}
)
MENDING = {
    1: "rebuild with --class-ids background-none",
    -1: "rebuild with --class-ids background-first",
}


def stem(word: str) -> str:
    """Reduce a plain English plural to its singular; other words stay as they are, or are cut the
    same way wherever they occur.
    """
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "ches", "shes")):
        return word[:-2]

    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def caption_words(captions: Iterable[str]) -> set[str]:
    """Return the stems of all words in some English captions."""
    return {stem(word) for text in captions for word in WORD.findall(text.lower())}


def spellings(name: str) -> list[list[str]]:
    """List the stemmed words of each alternative of a class name ("stop sign,stopsign")."""
    parts = [[stem(word) for word in WORD.findall(part.lower())] for part in name.split(",")]
    return [words for words in parts if words]


class ClassShift:
    """Collect evidence that `names[id + s]` is the right name of class `id`, for s in SHIFTS."""

    def __init__(self, names: Sequence[str], num_classes: int, background: int | None) -> None:
        self.named = any(name for index, name in enumerate(names) if index != background)
        self.by_word: dict[str, list[int]] = {}
        self.high = np.zeros(num_classes, bool)
        self.low = np.zeros(num_classes, bool)
        for index, name in enumerate(names[:num_classes]):
            if index != background:
                self._learn(index, spellings(name))

        # [classes], in images: captions name the class; it was detected in an image with captions;
        # it was detected in any image; its regions were in the upper half on average
        self.told, self.seen, self.placed, self.upper = (
            np.zeros(num_classes, np.int64) for _ in range(4)
        )
        self.matches = np.zeros(len(SHIFTS), np.int64)
        self.captioned = self.images = 0

    def _learn(self, index: int, alternatives: list[list[str]]) -> None:
        for words in alternatives:
            classes = self.by_word.setdefault(words[-1], [])
            if index not in classes:
                classes.append(index)
            self.high[index] |= " ".join(words) in HIGH
            self.low[index] |= " ".join(words) in LOW

    def add(self, labels: np.ndarray, heights: np.ndarray, captions: Sequence[str]) -> None:
        """Add one image: class ids [R] of its confident regions, the y [R] of their centres as a
        share of the height, and its English captions.
        """
        classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if not self.named or len(classes) == 0:
            return

        self.images += 1
        self.placed[classes] += 1
        self.upper[classes] += np.bincount(inverse, heights) / counts < 0.5
        if not captions:
            return

        self.captioned += 1
        told = {index for word in caption_words(captions) for index in self.by_word.get(word, ())}
        self.told[list(told)] += 1
        self.seen[classes] += 1
        found = classes.tolist()
        self.matches += [sum(label + shift in told for label in found) for shift in SHIFTS]

    def by_captions(self) -> list[dict[str, Any]]:
        """Return for each shift how many names are in the captions of their own image, how many
        chance would give, and z.
        """
        # share of images whose captions name the class
        share = self.told / max(self.captioned, 1)
        rows = []

        for shift, matches in zip(SHIFTS, self.matches, strict=True):
            chance = _shifted(share, shift)
            rows.append(
                _score(shift, int(matches), self.seen @ chance, self.seen @ (chance * (1 - chance)))
            )

        return rows

    def by_places(self) -> list[dict[str, Any]]:
        """Return the same for well-known places: sky and ceilings above the middle, floors and
        shoes below it.
        """
        chance = self.upper.sum() / max(self.placed.sum(), 1)
        rows = []

        for shift in SHIFTS:
            high = _shifted(self.high, shift)
            low = _shifted(self.low, shift)
            seen_high = int(self.placed @ high)
            seen_low = int(self.placed @ low)
            right = int(self.upper @ high) + seen_low - int(self.upper @ low)
            expected = seen_high * chance + seen_low * (1 - chance)
            rows.append(
                _score(shift, right, expected, (seen_high + seen_low) * chance * (1 - chance))
            )

        return rows

    def result(self) -> dict[str, Any]:
        """Return the evidence used (captions, places, none), the shift found (None if unknown), the
        scores of all shifts, and a sentence.
        """
        if not self.named:
            return _nothing("the store has no class names: give them with --class-names")
        for evidence, images, scores in (
            ("captions", self.captioned, self.by_captions()),
            ("places", self.images, self.by_places()),
        ):
            shift = decide(scores) if images >= LEAST_IMAGES else None
            if shift is not None:
                return {
                    "evidence": evidence,
                    "shift": shift,
                    "images": images,
                    "scores": scores,
                    "captions_fit": self.captions_fit(),
                    "said": _said(evidence, shift),
                }

        scores = self.by_captions() if self.captioned else self.by_places()
        said = (
            f"not enough evidence in {self.captioned} images with English captions and"
            f" {self.images} with regions"
        )

        return {
            **_nothing(said),
            "images": self.images,
            "scores": scores,
            "captions_fit": self.captions_fit(),
        }

    def captions_fit(self) -> bool | None:
        """Check whether class names, shifted or not, fit the captions of their own image better
        than by chance; None if the images are too few to tell.
        """
        scores = self.by_captions()
        if max(row["z"] for row in scores) >= CLEAR:
            return True

        none = scores[SHIFTS.index(0)]
        usual = _score(0, USUAL_LIFT * none["expected"], none["expected"], none["variance"])

        return False if self.captioned >= LEAST_IMAGES and usual["z"] > CLEAR else None


def decide(scores: Sequence[dict[str, Any]]) -> int | None:
    """Return the shift that fits clearly better than chance and, unless it is 0, clearly better
    than no shift; None if there is no such shift.
    """
    best = max(scores, key=lambda row: row["z"])
    none = scores[SHIFTS.index(0)]
    gain, gain_of_none = (row["matches"] - row["expected"] for row in (best, none))
    if best["z"] < CLEAR:
        return None
    if best is none:
        return 0

    clear = (
        gain >= 2 * gain_of_none
        and best["z"] - none["z"] >= CLEAR - 1
        and best["matches"] >= LEAST_LIFT * best["expected"]
    )

    return best["shift"] if clear else None


def _shifted(values: np.ndarray, shift: int) -> np.ndarray:
    """Return values[id + shift] for each id, with 0 beyond the ends."""
    result = np.zeros(len(values))
    ids = np.arange(max(0, -shift), min(len(values), len(values) - shift))
    result[ids] = values[ids + shift]
    return result


def _score(shift: int, matches: float, expected: float, variance: float) -> dict[str, Any]:
    z = (matches - expected) / np.sqrt(max(variance, 1.0))
    return {
        "shift": shift,
        "matches": matches,
        "expected": round(float(expected), 1),
        "variance": round(float(variance), 1),
        "z": round(float(z), 1),
    }


def _nothing(said: str) -> dict[str, Any]:
    return {
        "evidence": "none",
        "shift": None,
        "images": 0,
        "scores": [],
        "captions_fit": None,
        "said": said,
    }


def _said(evidence: str, shift: int) -> str:
    fit = {
        "captions": "names fit the captions",
        "places": "names fit well-known places (sky high, ground low)",
    }[evidence]
    if shift == 0:
        return f"class ids are right: {fit} best as they are"

    return f"class ids look shifted by {shift:+d}: {fit} best when {shift:+d} is added to every id"
