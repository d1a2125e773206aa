"""Find the most similar images for each image of a region store, for hard captions in finetuning.

    interbert mine-neighbours coco

Writes hard_images.npy [images, K] into the store, nearest first (by Euclidean distance of mean
region features) and never the image itself. The search is exact. Memory holds the mean features,
and --block x images distances.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, argument, option
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import HARD_IMAGES
from megatron_interbert.errors import UsageError
from megatron_interbert.files import own_name, whole_file
from megatron_interbert.preparation.mining.neighbours import mean_features, nearest_images


@dataclass
class Options(Flags):
    """Hold the flags of mine-neighbours."""

    GROUP: ClassVar[str] = "search"

    store: str = argument("region store", group="data")
    neighbours: int = option(100, "neighbours kept per image", least=1)
    block: int = option(2048, "images compared with all others at a time", least=1)


def run(options: Options) -> None:
    """Search the neighbours and write them into the store."""
    corpus = Corpus([options.store])
    if corpus.num_images < 2:
        raise UsageError(f"{options.store}: expected two or more images to find neighbours")

    most = min(options.neighbours, corpus.num_images - 1)
    found = nearest_images(mean_features(corpus), most, options.block)

    path = Path(options.store) / HARD_IMAGES
    try:
        with whole_file(path, own_name(path)) as handle:
            np.save(handle, found)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({error}); free some space or choose a store that can be"
            " written to"
        ) from error

    print(f"{path}: {found.shape[1]} neighbours of each of {len(found)} images")


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
