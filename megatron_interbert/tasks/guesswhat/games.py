"""Read games of GuessWhat: a dialogue of questions about one object of a picture."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_regular, reading
from megatron_interbert.tasks.drops import Drops
from megatron_interbert.tasks.grounding.boxes import corners_of
from megatron_interbert.tasks.records import check_entry, parse_records

ANSWERS = ("Yes", "No", "N/A")
FINISHED = ("success", "failure")  # games that came to a guess
# `dialogue_id` is the name in the published files, `image` that in the form which VOLTA reads
OTHER_NAMES = {"dialogue_id": "id", "image": "picture"}
TURN_NAMES = {"question_id": "id", "question": "q", "answer": "a"}
KEYS = {"id": (int, str), "object_id": (int, str), "picture": dict, "qas": list}


@dataclass(frozen=True)
class Turn:
    """Hold a question of a dialogue and its answer, one of ANSWERS."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class Game:
    """Hold a game: the name and size of its picture, its objects' boxes [n, 4] in pixels and kinds,
    the place of the object that it is about, and the dialogue.
    """

    id: str
    image: str
    size: tuple[float, float]
    boxes: np.ndarray
    kinds: tuple[str, ...]
    target: int
    turns: tuple[Turn, ...]
    is_finished: bool


def read_games(paths: Sequence[str]) -> Iterator[Game]:
    """Yield the games of files of JSON lines, plain or compressed by gzip.

    Raises UsageError that names the line if a key is missing or of another kind.
    """
    if not paths:
        raise UsageError("--games is missing; give guesswhat.SPLIT.jsonl.gz")

    for path in paths:
        for where, entry in parse_records(text_of(path), path, "--games", KEYS, OTHER_NAMES):
            yield game_of(entry, where)


def finished_games(paths: Sequence[str]) -> tuple[list[Game], Drops]:
    """Return the games of files that came to a guess, and the others as drops: they are no part of
    the task, not even where every sample must be answered.
    """
    games = list(read_games(paths))
    drops = Drops()
    for game in games:
        if not game.is_finished:
            drops.add("the game came to no guess", game.id)

    return [game for game in games if game.is_finished], drops


def text_of(path: str) -> str:
    """Return the text of a file, uncompressed if it is gzip's."""
    try:
        with reading(path):
            content = read_regular(Path(path))
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"--games: cannot read {path} ({reason})") from error
    except (EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UsageError(f"--games {path}: damaged, or not UTF-8 text ({error})") from error


def game_of(entry: dict[str, Any], where: str) -> Game:
    """Return a game from its record."""
    picture = entry["picture"]
    check_entry(picture, {"width": (int, float), "height": (int, float)}, f"{where}: picture")
    name = picture.get("file_name") or picture.get("id")
    if not isinstance(name, str | int):
        raise UsageError(f"{where}: picture has no 'file_name' and no 'id'")

    objects = objects_of(entry.get("objects"), where)
    boxes = [corners_of(some["bbox"], f"{where}: object {some['id']}") for some in objects]
    numbers = [str(found["id"]) for found in objects]
    if str(entry["object_id"]) not in numbers:
        raise UsageError(f"{where}: object {entry['object_id']} is not among its objects")

    return Game(
        str(entry["id"]),
        str(name),
        (float(picture["width"]), float(picture["height"])),
        np.stack(boxes),
        tuple(str(found["category"]) for found in objects),
        numbers.index(str(entry["object_id"])),
        tuple(turn_of(turn, where) for turn in entry["qas"]),
        entry.get("status", FINISHED[0]) in FINISHED,
    )


def objects_of(objects: Any, where: str) -> list[dict[str, Any]]:
    """Return the objects of a game, a list or an object by id, checked."""
    listed = list(objects.values()) if isinstance(objects, dict) else objects
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"{where}: 'objects' holds none, expected a list or an object by id")

    for found in listed:
        check_entry(found, {"id": (int, str), "bbox": list, "category": str}, f"{where}: object")

    return listed


def turn_of(turn: Any, where: str) -> Turn:
    """Return a question and its answer from their record."""
    if isinstance(turn, dict):
        turn = {TURN_NAMES.get(name, name): value for name, value in turn.items()}

    check_entry(turn, {"id": (int, str), "q": str, "a": str}, f"{where}: question")
    answer = next((known for known in ANSWERS if known.lower() == turn["a"].strip().lower()), None)
    if answer is None:
        expected = ", ".join(ANSWERS)
        raise UsageError(
            f"{where}: question {turn['id']}: answer {json.dumps(turn['a'])[:40]}, expected one of"
            f" {expected}"
        )

    return Turn(str(turn["id"]), turn["q"].strip(), answer)
