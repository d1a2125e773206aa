"""Decide which name and which captions each image of a build has, once all images are known.

A unit is converted as if no other image had the keys of its images (data/image_names.py). Where
that turns out to be wrong, its images lose the captions that may belong to others, and its shard is
written again. Images of one id from different sources are kept under names that begin with their
source.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_interbert.data.image_names import (
    NUMBER,
    SAME,
    ImageName,
    are_spelt_both_ways,
    is_short_number,
)
from megatron_interbert.preparation.building.captions.table import CaptionTable
from megatron_interbert.preparation.building.name_table import Meaning
from megatron_interbert.preparation.building.shard_writer import storable
from megatron_interbert.progress import progress

NO_CAPTION = "no caption"
NOT_WANTED = "not in --only"
TWICE = "image id seen before in its source"
AGAIN = "the same image again"
MERGED = "image id seen before in its source, its captions kept with the first"
UNCLEAR = "its captions may belong to another image of that name"
UNCLEAR_ONLY = "--only may mean another image of that name"
ADVICE = {
    UNCLEAR: "Name images in the captions as in the features; or build a store from each source"
    " with its own captions, then join the stores",
    UNCLEAR_ONLY: "Write the ids of --only as in the sources",
}
# why captions are left out
OF_DROPPED = "of images that were left out"
OF_SEVERAL = "unclear which image their name means"
LESS_EXACT = "other captions name the image more exactly"
OF_NONE = "no image of that name"
FAR_MORE = 3  # times as many images as another kind of name means
FAR = np.iinfo(np.int64).max


@dataclass
class Images:
    """Hold all images that the sources of a build name, in order.

    `sources` are the numbers of their sources. `rows` are their numbers in all shards together, -1
    if they were dropped; `mute` says that no caption means them.
    """

    names: list[str] = field(default_factory=list)
    sources: array = field(default_factory=lambda: array("i"))
    rows: array = field(default_factory=lambda: array("q"))
    mute: array = field(default_factory=lambda: array("b"))
    kept: int = 0

    def add(self, name: str, source: int, kept: bool, mute: bool = False) -> None:
        """Add an image, with the next row if it is kept.

        Names that no store can hold are of images that were dropped; no other name means them.
        """
        if not storable(name):
            return

        self.names.append(name)
        self.sources.append(source)
        self.rows.append(self.kept if kept else -1)
        self.mute.append(mute)
        self.kept += kept


@dataclass
class Change:
    """Hold what becomes of an image that was converted: dropped for a reason, renamed, or given
    other captions; None for what stays.
    """

    reason: str = ""
    name: str | None = None
    captions: list[tuple[str, str]] | None = None


@dataclass
class Decision:
    """Hold the changes by row, and the captions and wanted ids that are of no use."""

    changes: dict[int, Change] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)  # captions by reason
    examples: dict[str, str] = field(default_factory=dict)  # the name in one of them
    repeated: dict[int, list[int]] = field(default_factory=dict)  # later rows by the first one
    not_found: list[str] = field(default_factory=list)  # wanted names that mean no image
    renamed: int = 0


def decide(
    images: Images, labels: Sequence[str], table: CaptionTable | None, captions: bool, only: bool
) -> Decision:
    """Decide about all images of a build; `labels` are short names of the sources.

    `captions` and `only` say whether the table has captions and wanted ids.
    """
    decision = Decision()
    twice = _find_repeated(images, decision)
    double = _of_several_sources(images)
    if table is not None:
        clashes = Clashes(images, double)
        if captions:
            _decide_captions(images, twice, clashes, table, decision)
        if only:
            _decide_wanted(images, twice, clashes, table, decision)

    _rename(images, double, labels, decision)

    return decision


def _find_repeated(images: Images, decision: Decision) -> np.ndarray:
    """Find images of an id that their source has had before, bool [images], and drop those that
    were kept; one that was dropped does not count as the first.
    """
    first: dict[tuple[int, str], int] = {}
    repeated = np.zeros(len(images.names), bool)

    for number, row in enumerate(images.rows):
        image = images.sources[number], images.names[number]
        repeated[number] = image in first
        if row >= 0 and image in first:
            decision.changes[row] = Change(TWICE)
            decision.repeated.setdefault(first[image], []).append(row)
        elif row >= 0:
            first[image] = row

    return repeated


def _of_several_sources(images: Images) -> set[str]:
    """Return the ids that images of more than one source have."""
    first: dict[str, int] = {}
    return {
        name
        for name, source in zip(images.names, images.sources, strict=True)
        if first.setdefault(name, source) != source
    }


class Clashes:
    """Tell by which keys names mean more than one image of the build."""

    def __init__(self, images: Images, double: set[str]) -> None:
        self.double = double
        self.mixed = are_spelt_both_ways(images.names)
        hashes = array("q")
        for name, _ in set(zip(images.names, images.sources, strict=True)):
            hashes.extend(key_hash(key) for key in ImageName(name).meanings())

        self.keys, counts = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
        self.unclear = set(self.keys[counts > 1].tolist())

    def allow(self, image_id: str, meaning: Meaning) -> bool:
        """Check whether a name means only this image."""
        if meaning.other_spelling and self.mixed:
            return False
        if meaning.kind == SAME:
            return image_id not in self.double

        return key_hash(meaning.key) not in self.unclear

    def know(self, key: str) -> bool:
        """Check whether an image has a key; keys of files are those of the ends of paths too."""
        wanted = key_hash(key.replace("file:", "end:", 1))
        place = np.searchsorted(self.keys, wanted)

        return bool(place < len(self.keys) and self.keys[place] == wanted)


def key_hash(key: str) -> int:
    """Return 64 bits that stand for a key."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass
class Pairs:
    """Hold which targets mean which images, all int64 [pairs]; and, bool [pairs], whether a target
    means only that image, and whether by a name that is unlikely to be another's too.
    """

    image: np.ndarray
    target: np.ndarray
    place: np.ndarray
    rank: np.ndarray
    allowed: np.ndarray
    surely: np.ndarray

    def those(self, chosen: np.ndarray) -> "Pairs":
        """Return some of the pairs."""
        return Pairs(*(column[chosen] for column in vars(self).values()))

    def numbered(self, targets: int) -> np.ndarray:
        """Return a number for each pair of an image and one of so many targets, int64 [pairs]."""
        return self.image * targets + self.target

    def targets_of(self, image: int) -> np.ndarray:
        """Return the targets of one image, in order; pairs are sorted by image."""
        first, last = np.searchsorted(self.image, (image, image + 1))
        return np.sort(self.target[first:last])

    def most_reliable(self) -> "Pairs":
        """Return for each image the pairs of the lowest rank, those that a unit supposes."""
        return self.those(self.rank == _least(self.image, self.rank)[self.image])

    def by_one_name(self, kinds: np.ndarray) -> "Pairs":
        """Return the pairs by the one name that counts for the targets of each kind: the most
        reliable one, unless another means far more images; `kinds` are int64 [targets].
        """
        kind = kinds[self.target]
        best = np.zeros(int(kinds.max(initial=-1)) + 1, np.int64)

        for number in np.unique(kind).tolist():
            of_kind = self.those((kind == number) & self.allowed)
            if of_kind.surely.any():  # then the others may be accidents
                of_kind = of_kind.those(of_kind.surely)
            most = 0
            for place in np.unique(of_kind.place).tolist():
                images = len(np.unique(of_kind.image[of_kind.place == place]))
                if images >= FAR_MORE * most:
                    best[number], most = place, images

        return self.those(self.place == best[kind])

    def decided(self) -> "Pairs":
        """Return the pairs that remain of those by one name."""
        return self.those(self.allowed).most_reliable()


def _least(of: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the least value of each number in `of`, int64 [highest number + 1]."""
    least = np.full(int(of.max(initial=-1)) + 1, FAR)
    np.minimum.at(least, of, values)

    return least


def _pairs(images: Images, twice: np.ndarray, clashes: Clashes, table: CaptionTable) -> Pairs:
    rows = array("q")
    for number, name in enumerate(progress(images.names, unit="image", desc="joining")):
        if images.mute[number] or twice[number]:
            continue
        for meaning in table.targets_of(name):
            allowed = clashes.allow(name, meaning)
            surely = meaning.kind != NUMBER and not is_short_number(name)
            rows.extend((number, meaning.target, meaning.place, meaning.rank, allowed, surely))

    columns = np.frombuffer(rows, np.int64).reshape(-1, 6).T

    return Pairs(*columns[:4], *columns[4:].astype(bool))


def _decide_captions(
    images: Images, twice: np.ndarray, clashes: Clashes, table: CaptionTable, decision: Decision
) -> None:
    """Find the images whose captions are not those that their unit supposed, and count the captions
    that no image gets.
    """
    pairs = _pairs(images, twice, clashes, table)
    supposed = pairs.most_reliable()
    pairs = pairs.by_one_name(table.kinds())
    decided = pairs.decided()
    counts = table.counts()
    changed = np.setxor1d(supposed.numbered(len(counts)), decided.numbered(len(counts)))
    for image in np.unique(changed // max(len(counts), 1)).tolist():
        row = images.rows[image]
        if row >= 0:
            captions = table.captions_of(decided.targets_of(image))
            others = np.isin(pairs.targets_of(image), decided.target).all()
            reason = NO_CAPTION if others else UNCLEAR
            decision.changes[row] = Change("" if captions else reason, captions=captions)

    used = decided.those(np.array(images.rows)[decided.image] >= 0)
    unclear = [target for target, key in table.unclear_keys() if clashes.know(key)]
    _count_captions(pairs, decided, used, np.array(unclear, int), counts, table, decision)


def _count_captions(
    pairs: Pairs,
    decided: Pairs,
    used: Pairs,
    unclear: np.ndarray,
    counts: np.ndarray,
    table: CaptionTable,
    decision: Decision,
) -> None:
    """Count the captions of each target that no image gets, by the reason; `unclear` are targets
    whose names other targets share.
    """
    classes = [
        (None, used.target),
        (OF_DROPPED, decided.target),
        (LESS_EXACT, pairs.target[pairs.allowed]),
        (OF_SEVERAL, np.concatenate([pairs.target, unclear])),
        (OF_NONE, np.arange(len(counts))),
    ]
    free = np.ones(len(counts), bool)

    for reason, targets in classes:
        these = np.unique(targets[free[targets]])
        free[these] = False
        if reason and len(these):
            decision.left_out[reason] = int(counts[these].sum())
            decision.examples[reason] = table.name_of(these[0])


def _decide_wanted(
    images: Images, twice: np.ndarray, clashes: Clashes, table: CaptionTable, decision: Decision
) -> None:
    """Drop images that --only may not mean, and count what it names in vain."""
    rejected: dict[int, list[int]] = {}  # targets of kept images that none of them surely means
    found: set[int] = set()

    for number, name in enumerate(progress(images.names, unit="image", desc="--only")):
        meanings = [] if twice[number] else table.wanted_as(name)
        sure = [m.target for m in meanings if m.kind == SAME or clashes.allow(name, m)]
        found.update(sure)
        if meanings and not sure and images.rows[number] >= 0:
            rejected[images.rows[number]] = [meaning.target for meaning in meanings]

    for row, targets in rejected.items():
        decision.changes[row] = Change(NOT_WANTED if found.issuperset(targets) else UNCLEAR_ONLY)

    names = table.wanted_names()
    decision.not_found = [text for target, text in names.items() if target not in found]


def _rename(images: Images, double: set[str], labels: Sequence[str], decision: Decision) -> None:
    """Let the ids that several sources have begin with the label of the source."""
    if not double:
        return

    kept: dict[str, set[int]] = {}
    for number, row in enumerate(images.rows):
        change = decision.changes.get(row)
        if row >= 0 and images.names[number] in double and not (change and change.reason):
            kept.setdefault(images.names[number], set()).add(images.sources[number])

    taken = set(images.names)
    for number, row in enumerate(images.rows):
        name = images.names[number]
        if row < 0 or len(kept.get(name, ())) < 2:
            continue

        change = decision.changes.setdefault(row, Change())
        if change.reason:
            continue

        change.name = _new_name(labels[images.sources[number]], name, taken)
        taken.add(change.name)
        decision.renamed += 1


def _new_name(label: str, name: str, taken: set[str]) -> str:
    """Return a name that no image has: `label/name`, or with a number after the label."""
    number = 1
    new = f"{label}/{name}"
    while new in taken:
        number += 1
        new = f"{label}-{number}/{name}"

    return new


def source_labels(paths: Sequence[str]) -> list[str]:
    """Return a short name for each source: the name of its file or folder without ending, with as
    many folders before it as tell it from others; or a number where nothing does.
    """
    places = [Path(path).absolute() for path in paths]
    parts = [(*place.parent.parts, place.stem) for place in places]
    longest = max(map(len, parts), default=0)

    for length in range(1, longest + 1):
        labels = ["/".join(part[-length:]).strip("/") for part in parts]
        if len(set(labels)) == len(labels) and all(map(storable, labels)):
            return labels

    return [f"source-{number}" for number in range(1, len(paths) + 1)]
