"""Read Flickr30k Entities: sentences whose phrases name chains, and the boxes of each chain."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256, json_sha256
from megatron_interbert.reading import is_there, read_text
from megatron_interbert.tasks.drops import Drops
from megatron_interbert.tasks.grounding.records import RegionRecord, place_in
from megatron_interbert.tasks.name_lists import read_names
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.two_stores import TwoStores

PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s\]]+)+)\s+([^\]]*)\]")
NOT_VISUAL = "0"
UNRELATED = "UNRELATED_CAPTIONS"
OF_UNRELATED = "the sentence is unrelated to the image"
SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class Phrase:
    """Hold a phrase of a sentence, the chain of mentions it belongs to, and its kinds."""

    text: str
    chain: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Chains:
    """Hold the boxes of each chain of an image, and the image's width and height."""

    boxes: dict[str, np.ndarray]
    size: tuple[float, float]


def read_phrases(
    folder: str,
    images: str,
    stores: TwoStores,
    context: bool = False,
    merged: bool = False,
    whole: bool = False,
) -> Records:
    """Read the phrases of the images that a file lists, each with the boxes of its chain, or with
    the one box around all if `merged`; with `context` also the sentence.

    Phrases without boxes (not visual, scenes, or outside the picture) and those of sentences that
    the data set lists as unrelated to their image are no part of the task; they are counted as
    dropped. So are phrases without an image in the stores; if `whole`, that raises UsageError.
    Raises UsageError that names a file that is missing or damaged.
    """
    if not folder or not images:
        raise UsageError(
            "--entities or --images is missing; give the folder of Flickr30k Entities, and"
            " train.txt, val.txt or test.txt"
        )

    root = Path(folder)
    unrelated = read_unrelated(root / UNRELATED)
    hashes: list[str] = []
    records: list[RegionRecord] = []
    boxless = Drops()

    for image in read_names(images, "--images"):
        annotation, sentences = files_of(root, image, images)
        hashes += [file_sha256(annotation), file_sha256(sentences)]
        chains = read_chains(annotation)
        for number, line in enumerate(sentences_of(sentences), 1):
            for record in records_of(image, number, line, chains, context, merged):
                if (image, number) in unrelated:
                    boxless.add(OF_UNRELATED, name_of(record))
                elif isinstance(record, tuple):
                    boxless.add(record[1], record[0])
                else:
                    records.append(record)

    placed = place_in(stores, images, records, whole, boxless)
    placed.content = json_sha256([sorted(unrelated), hashes])

    return placed


def name_of(record: RegionRecord | Rejected) -> str:
    """Return the id of a phrase."""
    return record[0] if isinstance(record, tuple) else record.id


def files_of(root: Path, image: str, images: str) -> tuple[Path, Path]:
    """Return the annotation and the sentences of an image that the file `images` lists.

    Raises UsageError if one is not there.
    """
    found = root / "Annotations" / f"{image}.xml", root / "Sentences" / f"{image}.txt"
    for path in found:
        if not is_there(path):
            raise UsageError(
                f"--images {images}: lists {image:.80}, but --entities has no {path.parent.name}/"
                f"{path.name:.80}; give its train.txt, val.txt or test.txt"
            )

    return found


def sentences_of(path: Path) -> list[str]:
    """Return the sentences of an image as they are written."""
    return [line for line in read_text(path, "--entities").split("\n") if line.strip()]


def read_unrelated(path: Path) -> set[tuple[str, int]]:
    """Read which sentences do not describe their image: (image, number of the sentence from 1)."""
    if not is_there(path):
        return set()

    found = set()
    for line in read_text(path, "--entities").splitlines():
        words = line.split("#")[0].split()
        if len(words) == 2 and words[1].isdigit():
            found.add((words[0], int(words[1])))

    return found


def parse_sentence(line: str) -> tuple[str, list[Phrase]]:
    """Return the plain text of a sentence, and its phrases."""
    phrases = [
        Phrase(text.strip(), chain, tuple(kinds.strip("/").split("/")))
        for chain, kinds, text in PHRASE.findall(line)
    ]
    return " ".join(PHRASE.sub(r"\3", line).split()), phrases


def read_chains(path: Path) -> Chains:
    """Read the boxes of an image's chains; those of files count from 1, ours from 0."""
    text = read_text(path, "--entities")

    try:
        root = ElementTree.fromstring(text)
        size = tuple(float(root.findtext(f"size/{side}") or "") for side in ("width", "height"))
        boxes = defaultdict(list)
        for entry in root.findall("object"):
            box = entry.find("bndbox")
            if box is not None:
                corners = [float(box.findtext(side) or "") - 1 for side in SIDES]
                for name in entry.findall("name"):
                    boxes[(name.text or "").strip()].append(corners)
    except (ElementTree.ParseError, ValueError) as error:
        raise UsageError(
            f"--entities {path}: not an annotation of Flickr30k Entities ({error})"
        ) from error

    return Chains({chain: np.array(some, np.float32) for chain, some in boxes.items()}, size)


def records_of(
    image: str, number: int, line: str, chains: Chains, context: bool, merged: bool
) -> Iterator[RegionRecord | Rejected]:
    """Yield the phrases of a sentence that have boxes, with their kinds as facts, and (id, reason)
    of the others.
    """
    sentence, phrases = parse_sentence(line)

    for place, phrase in enumerate(phrases):
        name = f"{image}-{number}-{place}"
        boxes = chains.boxes.get(phrase.chain)
        if phrase.chain == NOT_VISUAL:
            yield name, "the phrase is not visual"
            continue
        if boxes is None:
            yield name, "the phrase has no box"
            continue
        if not phrase.text:
            yield name, "the phrase has no text"
            continue

        if merged:
            boxes = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])[None]

        texts = (phrase.text, sentence) if context else (phrase.text,)
        yield RegionRecord(name, texts, (image,), chains.size, boxes, facts=phrase.kinds)
