"""Mine hard negatives of a region store: captions of other images that are alike, but not too
alike.

    interbert mine-negatives coco

Finds for each caption the most similar ones below a TF-IDF similarity. Writes hard_negatives.npy
into the store, from which training draws part of its mismatched captions (--hard-negatives). A
search that was stopped or killed is resumable: run the same command again.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_interbert.command_line import run_command
from megatron_interbert.commands.shared_work import SharedWorkOptions
from megatron_interbert.config.options import argument, option
from megatron_interbert.data.manifest import HARD_NEGATIVES
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.mining.search import MiningOptions, mine, no_progress
from megatron_interbert.preparation.sharing import read_team
from megatron_interbert.progress import progress

DEFAULTS = MiningOptions()
WITHOUT_EFFECT = "accepted and ignored: the search is always exact"


@dataclass
class Options(SharedWorkOptions):
    """Hold the flags of mine-negatives."""

    GROUP: ClassVar[str] = "search"

    store: str = argument("folder of a region store", group="data")
    overwrite: bool = option(False, f"replace {HARD_NEGATIVES} of the store", group="data")
    top: int = option(DEFAULTS.top, "negatives kept per caption")
    max_similarity: float = option(DEFAULTS.max_similarity, "negatives must be less similar")
    ngrams: str = option(
        ",".join(map(str, DEFAULTS.ngrams)), "lengths of n-grams of Chinese characters"
    )

    block: int = option(DEFAULTS.block, "captions between two saves", group="work")
    threads: int = option(len(os.sched_getaffinity(0)), "search threads", least=1, group="work")
    mode: str = option("exact", WITHOUT_EFFECT, ("exact", "pruned"), group="old flags")
    budget: int = option(0, WITHOUT_EFFECT, group="old flags")
    candidates: int = option(0, WITHOUT_EFFECT, group="old flags")
    check_recall: int = option(0, WITHOUT_EFFECT, group="old flags")
    show: int = option(
        0, "print this many captions with their hardest negatives", least=0, group="report"
    )


def lengths(text: str) -> tuple[int, ...]:
    """Read (1, 2) from `1,2`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--ngrams {text}: expected lengths from 1 to 8, such as 1,2") from None


@contextmanager
def bar(stage: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show the progress of a stage with the time left; yield its update function."""
    with progress(total=total, desc=stage, unit="caption", unit_scale=True) as shown:
        yield shown.update


def run(options: Options) -> None:
    """Mine negatives and report what was found.

    One process on each machine uses all of its cores; others there have nothing to do.
    """
    team = read_team(options.claim_timeout)
    if team.local_rank:
        return

    begun = time.monotonic()
    chosen = MiningOptions(
        options.top, options.max_similarity, lengths(options.ngrams), options.block
    )
    found = mine(
        RegionStore(options.store),
        chosen,
        options.threads,
        options.restart,
        options.overwrite,
        options.show,
        progress=bar if team.is_first else no_progress,
        team=team.of_machines(),
    )
    if found is None:
        return

    for line in found["examples"]:
        print(line)

    print(
        f"{Path(options.store) / HARD_NEGATIVES}: {found['captions']} captions,"
        f" {found['negatives']:.1f} negatives each, {found['without']} with none; mean similarity"
        f" {found['first']:.3f} for the first kept, {found['last']:.3f} for the last;"
        f" {time.monotonic() - begun:.1f} seconds"
    )


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
