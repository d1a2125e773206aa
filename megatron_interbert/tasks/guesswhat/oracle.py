"""Define the oracle: yes, no or not applicable, for a question about an object."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_interbert.config.stores import split_paths
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.job import Answering, answer_job, open_run, open_valid
from megatron_interbert.tasks.answering.records import Record, place_in
from megatron_interbert.tasks.answering.vocabulary import AnswerList
from megatron_interbert.tasks.grounding.boxes import problem_of
from megatron_interbert.tasks.guesswhat.config import OracleConfig
from megatron_interbert.tasks.guesswhat.games import ANSWERS, Game, finished_games
from megatron_interbert.tasks.guesswhat.oracle_samples import Asked, OracleSamples
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.task import Job


def oracle_metrics(records: Sequence[Record], given: Sequence[str]) -> dict[str, float]:
    """Return the accuracy and the error of the answers, in percent."""
    right = [answer in record.answers for record, answer in zip(records, given, strict=True)]
    accuracy = 100.0 * float(np.mean(right))

    return {"accuracy": accuracy, "error": 100.0 - accuracy}


ORACLE = Answering("guesswhat_oracle", oracle_metrics, samples=OracleSamples)


def read_turns(paths: Sequence[str], corpus: Corpus, whole: bool = False) -> Records:
    """Read the questions of games, each with its object.

    Games that came to no guess are dropped and counted. So are questions without text, about a bad
    box or without an image in the corpus; if `whole`, that raises UsageError.
    """
    games, drops = finished_games(paths)
    records = [record for game in games for record in turns_of(game)]

    return place_in(corpus, ", ".join(paths), records, whole, drops)


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


def predictions(records: Sequence[Record], given: Sequence[str]) -> str:
    """Return the JSON lines of the answers."""
    lines = []
    for record, answer in zip(records, given, strict=True):
        asked = record.facts
        ids = {"dialogue_id": asked.dialogue, "question_id": asked.question}
        lines.append(json.dumps({**ids, "answer": answer}) + "\n")

    return "".join(lines)
