"""Find the most similar images for each image of a region store, for hard captions in finetuning.

    interbert mine-neighbours coco

Writes hard_images.npy [images, K] into the store, nearest first (by Euclidean distance of mean
region features) and never the image itself. The search is exact. Memory holds the mean features,
and --block x images distances. A search that was stopped or killed is resumable: run the same
command again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from megatron_interbert.command_line import run_command
from megatron_interbert.commands.shared_work import SharedWorkOptions
from megatron_interbert.config.options import argument, option
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import HARD_IMAGES
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.mining.neighbours import mine_neighbours
from megatron_interbert.preparation.mining.work import NeighbourFolder, work_on
from megatron_interbert.preparation.sharing import Team, read_team


@dataclass
class Options(SharedWorkOptions):
    """Hold the flags of mine-neighbours."""

    GROUP: ClassVar[str] = "search"

    store: str = argument("region store", group="data")
    overwrite: bool = option(False, f"replace {HARD_IMAGES} of the store", group="data")
    neighbours: int = option(100, "neighbours kept per image", least=1)
    block: int = option(2048, "images compared with all others at a time", least=1)
    device: str = option("auto", "where images are compared", ("auto", "cpu", "cuda"), group="work")


def device_of(options: Options, team: Team) -> torch.device:
    """Return the device of this process: a GPU of its own as far as there are enough."""
    gpus = torch.cuda.device_count() if options.device != "cpu" else 0
    if options.device == "cuda" and not gpus:
        raise UsageError("--device cuda: no CUDA device is visible here; use --device cpu")

    return torch.device("cuda", team.local_rank % gpus) if gpus else torch.device("cpu")


def run(options: Options) -> None:
    """Search the neighbours and write them into the store."""
    team = read_team(options.claim_timeout)
    corpus = Corpus([options.store])
    if corpus.num_images < 2:
        raise UsageError(f"{options.store}: expected two or more images to find neighbours")

    path = Path(options.store) / HARD_IMAGES
    most = min(options.neighbours, corpus.num_images - 1)
    folder = NeighbourFolder(corpus.stores[0], most, options.block)
    done = work_on(
        folder,
        team,
        options.restart,
        options.overwrite,
        lambda claims: mine_neighbours(corpus, folder, device_of(options, team), claims),
    )
    if done is not None:
        print(f"{path}: {most} neighbours of each of {corpus.num_images} images")


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
