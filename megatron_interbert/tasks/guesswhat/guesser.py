"""Define the guesser: which of the objects of a picture a dialogue is about."""

from collections.abc import Sequence

from megatron_interbert.config.stores import split_paths
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.grounding.figures import accuracy_and_error, is_nearest
from megatron_interbert.tasks.grounding.job import Pointing, open_run, open_valid, region_job
from megatron_interbert.tasks.grounding.records import RegionRecord, place_in
from megatron_interbert.tasks.guesswhat.config import GuesserConfig
from megatron_interbert.tasks.guesswhat.games import Game, finished_games
from megatron_interbert.tasks.placing import Records, Rejected
from megatron_interbert.tasks.task import Job
from megatron_interbert.tasks.two_stores import TwoStores

GUESSER = Pointing("guesswhat_guesser", is_nearest, accuracy_and_error, apart=False)


def read_dialogues(paths: Sequence[str], stores: TwoStores, whole: bool = False) -> Records:
    """Read whole dialogues, with the boxes of the objects to choose among.

    Games that came to no guess are dropped and counted. So are games without questions or without
    an image in the stores; if `whole`, that raises UsageError.
    """
    games, drops = finished_games(paths)
    return place_in(stores, ", ".join(paths), map(dialogue_of, games), whole, drops)


def dialogue_of(game: Game) -> RegionRecord | Rejected:
    """Return a game as a record, or (id, reason) if it cannot be used."""
    if not game.turns:
        return game.id, "the game has no questions"

    said = " ".join(f"start {turn.question} answer {turn.answer} stop" for turn in game.turns)
    target = game.boxes[game.target : game.target + 1]

    return RegionRecord(game.id, (said,), (game.image,), game.size, target, game.boxes, game.target)


def guesser_job(config: GuesserConfig, state: ParallelState) -> Job:
    """Build the job that finetunes on --games; the accuracy on --valid-games decides which
    checkpoint is best.
    """
    opened = open_run(config)
    paths = split_paths(config.games)
    records = read_dialogues(paths, opened.stores)
    valid = None

    if valid_paths := split_paths(config.valid_games):
        stores = open_valid(config, opened.stores)
        valid = (read_dialogues(valid_paths, stores), stores)

    return region_job(GUESSER, config, state, opened, records, paths, valid)
