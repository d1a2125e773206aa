#!/usr/bin/env python3
"""Mines hard negatives of a region store: for each caption the most similar ones below a TF-IDF similarity, of other images.

Writes hard_negatives.npy into the store, from which training draws a part of its mismatched captions (--hard-negatives).
Stopped or killed, the same command goes on.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.data.manifest import HARD_NEGATIVES
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.parser import Parser
from megatron_interbert.preparation.mining.search import MiningOptions, mine
from megatron_interbert.progress import progress


@contextmanager
def bar(stage: str, total: int) -> Iterator[Callable[[int], object]]:
    """Progress with the time left."""
    with progress(total=total, desc=stage, unit="caption", unit_scale=True) as shown:
        yield shown.update


def lengths(text: str) -> tuple[int, ...]:
    """1,2 -> (1, 2)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--ngrams {text}: expected lengths from 1 to 8, such as 1,2") from None


def parse(defaults: MiningOptions) -> argparse.Namespace:
    """The command line."""
    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="folder of a region store")
    parser.add_argument("--mode", default=defaults.mode, help="pruned: within a budget; exact: all of it (default: %(default)s)")
    parser.add_argument(
        "--budget", type=int, default=defaults.budget, help="list entries read for a caption (default: %(default)s)"
    )
    parser.add_argument(
        "--candidates", type=int, default=defaults.candidates, help="captions scored exactly (default: %(default)s)"
    )
    parser.add_argument("--top", type=int, default=defaults.top, help="negatives kept for a caption (default: %(default)s)")
    parser.add_argument("--max-similarity", type=float, default=defaults.max_similarity, help="below this (default: %(default)s)")
    parser.add_argument(
        "--ngrams", default=",".join(map(str, defaults.ngrams)), help="of Chinese characters (default: %(default)s)"
    )
    parser.add_argument("--block", type=int, default=defaults.block, help="captions between two saves (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: the cores, %(default)s)")
    parser.add_argument("--check-recall", type=int, default=0, metavar="N", help="compare N captions with the exact search")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N captions with their hardest negatives")
    parser.add_argument("--restart", action="store_true", help="throw unfinished work away")
    parser.add_argument("--overwrite", action="store_true", help=f"replace {HARD_NEGATIVES} of the store")
    return parser.parse_args()


def run() -> None:
    """Parse the command line, mine, and say what was found."""
    begun = time.monotonic()
    options = parse(MiningOptions())
    options.ngrams = lengths(options.ngrams)
    for name, least in (("threads", 1), ("check_recall", 0), ("show", 0)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected {least} or more")
    names = ("mode", "budget", "candidates", "top", "max_similarity", "ngrams", "block")
    chosen = MiningOptions(**{name: getattr(options, name) for name in names})
    work = (options.threads, options.restart, options.overwrite, options.check_recall, options.show)
    found = mine(RegionStore(options.store), chosen, *work, progress=bar)
    for line in found["examples"]:
        print(line)
    print(
        f"{Path(options.store) / HARD_NEGATIVES}: {found['captions']} captions, {found['negatives']:.1f} negatives each,"
        f" {found['without']} with none; mean similarity {found['first']:.3f} for the first kept, {found['last']:.3f} for the"
        f" last; {time.monotonic() - begun:.1f} seconds"
    )
    if "recall" in found:
        print(
            f"recall {found['recall']:.3f} of the exact search's negatives on {min(options.check_recall, found['captions'])} captions;"
            f" mean similarity lower by {found['lost']:.4f}"
        )


if __name__ == "__main__":
    run_entry(run)
