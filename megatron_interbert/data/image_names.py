"""Tell which image a name means: data sets, tools and people spell the name of one image in many
ways.

Equal names mean the same image. Other names mean it by a key that both have, strictest first:

    file      `a/b/07.jpg`, `a/b/07`     the path without the ending, accents in one form (NFC)
    folder    `a/b/07.jpg`, `b/07.png`   the end of the path
    number    `a/b/07.jpg`, `7`          a number without leading zeros and without COCO's prefix

The prefixes of `nlvr2_dev-1-0-img0.npz`, `v7w_7.jpg` and their like are no part of a name.

A key counts only where it means one image: if it is the key of one image in the build, and if the
captions do not use it for two different ones.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from urllib.parse import unquote

PHOTO_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    ".avif",
)
# of a photo, or of the features of one
ENDING = re.compile(
    "|".join(f"{re.escape(ending)}$" for ending in (*PHOTO_ENDINGS, ".npz", ".npy")), re.IGNORECASE
)
CAPTION_NUMBER = re.compile(r"#(?:[a-z]{2,10}[#_]?)?\d+$", re.IGNORECASE)  # Flickr's `1.jpg#zhc#0`
ADDRESS = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# before the names that a data set has itself, in files of UNITER and Visual7W
PREFIX = re.compile(
    r"^(?:nlvr2|flickr30k|gqa|vg|v7w|visual_grounding_(?:det_)?coco(?:_gt)?)_(?=[^/]*\d)",
    re.IGNORECASE,
)
COCO = re.compile(r"^COCO_(?:train|val|test)\d{4}_0*(\d+)$", re.IGNORECASE)
# a word in the name of a folder, as in train2014
SPLIT = re.compile(r"(?<![a-z])(train|val|test|dev)(?:ing|idation)?(?![a-z])")
LONG_STEM = 7  # letters of a file name that is unlikely to be in several folders
MOST_FOLDERS = 3  # that the end of a path may have

SAME = 0  # the names are equal
FILE = 1  # equal but for the ending, or the form in which accents are written
FOLDER = 2  # equal but for folders
NUMBER = 3  # equal but for leading zeros or COCO's prefix


class ImageName:
    """Take a name apart into what others may call the same image."""

    def __init__(self, text: str) -> None:
        self.text = text
        # without folders `.`; `.jpg` or empty; `v7w_` or empty
        self.path, self.ending, self.prefix = _parts_of(text)

    @property
    def stem(self) -> str:
        """Return the name without folders and ending."""
        return self.path.rpartition("/")[2]

    @cached_property
    def number(self) -> str:
        """Return the number that is the name, without leading zeros; empty for other names."""
        coco = COCO.match(self.stem)
        digits = coco[1] if coco else self.stem

        return (digits.lstrip("0") or "0") if digits.isascii() and digits.isdigit() else ""

    @property
    def names_split(self) -> bool:
        """Check whether the name is COCO's, with a split: COCO_train2014_000000000009."""
        return bool(self.number) and not self.stem.isdigit()

    @property
    def is_coco(self) -> bool:
        """Check whether the number is said to be COCO's."""
        return self.names_split or bool(self.number and "coco" in self.prefix)

    @property
    def ends(self) -> list[str]:
        """Return the ends of the path that are shorter than the path, longest first."""
        parts = self.path.split("/")
        longest = min(MOST_FOLDERS + 1, len(parts) - 1)

        return ["/".join(parts[-kept:]) for kept in range(longest, 0, -1)]

    @property
    def own_keys(self) -> list[str]:
        """Return the keys of the name: of its file, of each end of its path, of its number."""
        keys = [f"file:{self.path}", *(f"end:{end}" for end in self.ends)]
        return [*keys, f"number:{self.number}"] if self.number else keys

    def other_keys(self) -> Iterator[tuple[str, str, int]]:
        """Yield the keys by which other names mean this image: (a key of the other name, the key
        that must mean one image, FILE, FOLDER or NUMBER), strictest first.
        """
        yield f"file:{self.path}", f"file:{self.path}", FILE
        yield f"end:{self.path}", f"end:{self.path}", FOLDER

        for end in self.ends:
            yield f"file:{end}", f"end:{end}", FOLDER
            yield f"end:{end}", f"end:{end}", FOLDER

        if self.number:
            yield f"number:{self.number}", f"number:{self.number}", NUMBER

    def meanings(self) -> Iterator[str]:
        """Yield the keys that mean this image, and two images if another one yields them too."""
        yield f"file:{self.path}"
        yield f"end:{self.path}"

        for end in self.ends:
            yield f"end:{end}"
        if self.number:
            yield f"number:{self.number}"


def _parts_of(text: str) -> tuple[str, str, str]:
    """Split a name into its path with `/` between folders, and its ending and the prefix of its
    data set in lower case.

    The address of a photo loses its scheme and query, a name in a token file the number of the
    caption.
    """
    path, addresses = ADDRESS.subn("", unicodedata.normalize("NFC", text.strip()))
    if addresses:
        before = re.split(r"[?#]", path, maxsplit=1)[0]
        path = unquote(before if ENDING.search(before) else path)
    elif CAPTION_NUMBER.search(path) and ENDING.search(CAPTION_NUMBER.sub("", path)):
        path = CAPTION_NUMBER.sub("", path)

    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    prefix = PREFIX.match(parts[-1]) if parts else None
    if prefix:
        parts[-1] = parts[-1][prefix.end() :]

    path = "/".join(parts)
    ending = ENDING.search(path)

    return (
        path[: ending.start()] if ending else path,
        ending[0].lower() if ending else "",
        prefix[0].lower() if prefix else "",
    )


def paths_differ(one: ImageName, other: ImageName) -> bool:
    """Check whether the paths of two names that share a key say that they are different images.

    They do if none is the end of the other, and if the file names are short, as those of
    `1/main.jpg` and `2/main.jpg`, or the folders name different splits, as `train` and `val`.
    COCO's names need no folders: they differ if the file names do.
    """
    if one.names_split and other.names_split:
        return one.stem.casefold() != other.stem.casefold()
    if _is_end(one, other):
        return False

    if "/" not in one.path or "/" not in other.path:
        return False
    if min(len(one.stem), len(other.stem)) < LONG_STEM:
        return True

    splits = [set(SPLIT.findall(name.path.rpartition("/")[0].lower())) for name in (one, other)]

    return bool(splits[0] and splits[1] and splits[0] != splits[1])


def are_different_images(names: Iterable[str], kind: int) -> bool:
    """Check whether names that share a key of some kind mean more than one image.

    They do if they have different endings. FOLDER and NUMBER: also if they are not all ends of one
    path (COCO's names are unique without folders). NUMBER: also if they are spelt in different
    ways, as Visual Genome's `9` and COCO's `COCO_train2014_000000000009`.
    """
    first = longest = ImageName("")
    ending = ""

    for text in names:
        name = ImageName(text)
        if ending and name.ending and name.ending != ending:
            return True
        ending = ending or name.ending
        if kind == FILE:
            continue

        if not (name.is_coco and longest.is_coco) and not _is_end(name, longest):
            return True
        longest = max(name, longest, key=lambda known: len(known.path))
        first = first if first.path else name
        if kind == NUMBER and name.stem != first.stem:
            return True

    return False


def _is_end(one: ImageName, other: ImageName) -> bool:
    """Check whether one of two paths is the end of the other, or empty."""
    shorter, longer = sorted((f"/{one.path}", f"/{other.path}"), key=len)
    return shorter == "/" or longer.endswith(shorter)


def is_short_number(text: str) -> bool:
    """Check whether a name is a number as other data sets have it too."""
    stem = ImageName(text).stem
    return stem.isdigit() and len(stem) < LONG_STEM


def kind_of_key(key: str) -> int:
    """Return FILE, FOLDER or NUMBER for a key."""
    return {"file": FILE, "end": FOLDER, "number": NUMBER}[key.partition(":")[0]]


def match_names(asked: Iterable[str], numbers: Mapping[str, int]) -> dict[str, int]:
    """Find images, whose `numbers` are given by their ids, by the names that are asked for; names
    that mean no image, or more than one, are left out.
    """
    names = list(dict.fromkeys(asked))
    found = {name: numbers[name] for name in names if name in numbers}
    others = [ImageName(name) for name in names if name not in found]
    if not others:
        return found

    images = _first_with_key({key for name in others for key in name.meanings()}, numbers)
    spelt_both_ways = are_spelt_both_ways(numbers)
    unclear = _unclear_keys(names)
    unique = {key for key, ids in images.items() if len(ids) == 1} - unclear

    for name in others:
        near = {ids[0]: ImageName(ids[0]) for key in name.meanings() if (ids := images.get(key))}
        for image in near.values():
            other_spelling = spelt_both_ways and image.is_coco != name.is_coco
            if not other_spelling and _means(name, image, unique, unclear):
                found[name.text] = numbers[image.text]

    return found


def match_across(asked: Iterable[str], numbers: Mapping[str, int]) -> dict[str, int]:
    """Find images by names of several data sets, as match_names does; where some have COCO's prefix
    and others are plain numbers, those of one kind never mean images of the other.
    """
    names = list(asked)
    if not are_spelt_both_ways([*names, *numbers]):
        return match_names(names, numbers)

    found: dict[str, int] = {}
    for coco in (True, False):
        own = {name: number for name, number in numbers.items() if ImageName(name).is_coco == coco}
        found |= match_names([name for name in names if ImageName(name).is_coco == coco], own)

    return found


def may_mean(names: Iterable[str], others: Iterable[str]) -> set[str]:
    """Return those of some other names that mean an image of `names`, or might: where images must
    not be missed, a doubt counts as well.

    COCO's numbers are its images', whatever the split; they never mean images whose names are plain
    numbers.
    """
    paths: set[str] = set()
    ends: set[str] = set()
    numbers: set[tuple[bool, str]] = set()
    for name in map(ImageName, names):
        paths.add(name.path)
        ends.update(name.ends)
        if name.number:
            numbers.add((name.is_coco, name.number))

    return {
        name.text
        for name in map(ImageName, others)
        if name.path in paths
        or name.path in ends
        or not paths.isdisjoint(name.ends)
        or (name.is_coco, name.number) in numbers
    }


def _means(name: ImageName, image: ImageName, unique: set[str], unclear: set[str]) -> bool:
    """Check whether a name means an image by a key that is clear and means no other image."""
    own = set(name.own_keys) - unclear
    return not paths_differ(name, image) and any(
        key in own and needed in unique for key, needed, _ in image.other_keys()
    )


def _first_with_key(keys: set[str], ids: Iterable[str]) -> dict[str, list[str]]:
    """Return the first two ids that have each of some keys, where any has."""
    found: dict[str, list[str]] = {}
    for image_id in ids:
        for key in ImageName(image_id).meanings():
            if key in keys and len(found.setdefault(key, [])) < 2:
                found[key].append(image_id)

    return found


def _unclear_keys(names: Iterable[str]) -> set[str]:
    """Return the keys that some names use for different images."""
    users: dict[str, list[str]] = {}
    for text in names:
        for key in ImageName(text).own_keys:
            users.setdefault(key, []).append(text)

    return {key for key, texts in users.items() if are_different_images(texts, kind_of_key(key))}


def are_spelt_both_ways(names: Iterable[str]) -> bool:
    """Check whether some images are named as COCO does and others by plain numbers, which are then
    those of another data set, such as Visual Genome.
    """
    coco = False
    numbers = False

    for text in names:
        name = ImageName(text)
        coco = coco or name.is_coco
        numbers = numbers or bool(name.number and not name.is_coco)
        if coco and numbers:
            return True

    return False
