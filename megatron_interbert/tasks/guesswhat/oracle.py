"""Finetune and evaluate the oracle: yes, no or not applicable, for a question about an object.

A sample shows the scene and, beside it, the object alone, in the place that it has in the scene: so
the model knows which object is meant. Of the regions that a store has for the picture the object is
the one with the best IoU or, where none overlaps it, with the nearest centre; give the store of the
annotated boxes. The text is the question and the object's kind.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_interbert.config.stores import split_paths
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.region_batch import Allocate, RegionBatch, plain_memory, read_regions
from megatron_interbert.data.training_set import Fields
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.evaluation import evaluate_answers
from megatron_interbert.tasks.answering.job import Answering, answer_job, open_run, open_valid
from megatron_interbert.tasks.answering.records import Record, place_in
from megatron_interbert.tasks.answering.samples import AnswerSamples
from megatron_interbert.tasks.answering.vocabulary import AnswerList
from megatron_interbert.tasks.grounding.boxes import overlaps, problem_of
from megatron_interbert.tasks.guesswhat.config import EvaluateOracleConfig, OracleConfig
from megatron_interbert.tasks.guesswhat.games import ANSWERS, Game, finished_games
from megatron_interbert.tasks.pairs import pair_fields
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.task import Job


@dataclass(frozen=True, slots=True)
class Asked:
    """Hold the ids of a question and its dialogue, and the box of its object, x1 y1 x2 y2 as shares
    of the picture.
    """

    dialogue: str
    question: str
    box: np.ndarray


class OracleSamples(AnswerSamples):
    """Hold questions about objects; see the module's text."""

    def prepare(self) -> None:
        """Take the box of each question's object from the records."""
        self.boxes = np.stack([record.facts.box for record in self.records.items])

    @property
    def most_regions(self) -> int:
        """Return the most regions that a sample can have."""
        return super().most_regions + 1

    def fields(self, rows: Sequence[int], allocate: Allocate = plain_memory) -> Fields:
        """Return the fields of a PackedBatch for some samples [B], without labels."""
        regions = read_regions(self.corpus, self.images[rows, 0], self.max_regions)
        shown = with_object_beside(regions, self.boxes[rows])
        texts = self.texts.inputs(rows)
        dim = self.corpus.feature_dim

        return {
            **pair_fields(texts, shown, np.arange(len(texts)), dim, allocate),
            "head": self.head,
        }


def with_object_beside(regions: RegionBatch, boxes: np.ndarray) -> RegionBatch:
    """Return the regions of B images in the left half of a wide one, and in its right half, as the
    last region, the one that is nearest to each image's box [B, 4].
    """
    shares = regions.locations()[:, :4]
    order: list[int] = []
    is_object: list[bool] = []

    for image, (start, stop) in enumerate(zip(regions.offsets, regions.offsets[1:], strict=False)):
        nearest = start + nearest_region(shares[start:stop], boxes[image])
        order += [*range(start, stop), nearest]
        is_object += [False] * (stop - start) + [True]

    places = shares[order]
    places[:, 0::2] = (places[:, 0::2] + np.array(is_object)[:, None]) / 2
    images = len(regions.sizes)

    return RegionBatch(
        regions.features[order],
        places.astype(np.float32),
        regions.class_ids[:0],
        regions.class_probs[:0],
        np.ones((images, 2), np.float32),
        regions.offsets + np.arange(images + 1),
    )


def nearest_region(regions: np.ndarray, box: np.ndarray) -> int:
    """Return which of regions [n, 4] has the best IoU with a box [4] or, if none overlaps it, the
    nearest centre.
    """
    shared = overlaps(regions, box[None])[:, 0]
    if shared.max() > 0:
        return int(shared.argmax())

    away = (regions[:, :2] + regions[:, 2:]) - (box[:2] + box[2:])

    return int((away**2).sum(axis=1).argmin())


def oracle_metrics(records: Sequence[Record], given: Sequence[str]) -> dict[str, float]:
    """Return the accuracy and the error of the answers, in percent."""
    right = [answer in record.answers for record, answer in zip(records, given, strict=True)]
    accuracy = 100.0 * float(np.mean(right))

    return {"accuracy": accuracy, "error": 100.0 - accuracy}


ORACLE = Answering("guesswhat_oracle", oracle_metrics, ("accuracy", "error"), samples=OracleSamples)


def read_turns(paths: Sequence[str], corpus: Corpus, whole: bool = False) -> Records:
    """Read the questions of games, each with its object.

    Games that came to no guess are dropped and counted. So are questions without text, about a bad
    box or without an image in the corpus; if `whole`, that raises UsageError.
    """
    games, drops = finished_games(paths)
    records = [record for game in games for record in turns_of(game)]
    found = place_in(corpus, ", ".join(paths), records, whole)
    found.drops.take(drops)

    return found


def turns_of(game: Game) -> Iterator[Record | Rejected]:
    """Yield the questions of a game as records, or (id, reason) of those that cannot be used."""
    target = game.boxes[game.target]
    problem = problem_of(target[None], game.size)

    for place, turn in enumerate(game.turns):
        name = f"{game.id}-{place}"  # some files number the questions of each game anew
        if not turn.question:
            yield name, "the question has no text"
        elif problem:
            yield name, problem
        else:
            box = target / np.array([*game.size, *game.size], np.float32)
            texts = (turn.question, game.kinds[game.target])
            facts = Asked(game.id, turn.id, box)
            yield Record(name, texts, (game.image,), {turn.answer: 1.0}, facts)


def oracle_job(config: OracleConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on --games; the accuracy on --valid-games decides which
    checkpoint is best.
    """
    opened = open_run(config)
    paths = split_paths(config.games)
    records = read_turns(paths, opened.corpus)
    valid = None

    if valid_paths := split_paths(config.valid_games):
        corpus = open_valid(config, opened.corpus)
        valid = (read_turns(valid_paths, corpus), corpus)

    answers = AnswerList(ANSWERS)

    return answer_job(ORACLE, config, state, opened, answers, records, paths, valid)


def evaluate_oracle(
    config: EvaluateOracleConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json, result.html and, with --submission, the answers; return the result.

    All ranks of a launch must call it.
    """
    paths = split_paths(config.games)

    return evaluate_answers(
        ORACLE,
        config,
        state,
        device,
        paths,
        lambda config, corpus: read_turns(paths, corpus, config.submission),
        ("predictions.jsonl", predictions),
    )


def predictions(records: Sequence[Record], given: Sequence[str]) -> str:
    """Return the JSON lines of the answers."""
    lines = []
    for record, answer in zip(records, given, strict=True):
        asked = record.facts
        ids = {"dialogue_id": asked.dialogue, "question_id": asked.question}
        lines.append(json.dumps({**ids, "answer": answer}) + "\n")

    return "".join(lines)
